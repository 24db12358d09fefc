// What the headers of the latest response say about the key: mode, limits and credits.

export const limits = new EventTarget();

/** The latest values, by header name without `X-`; null: the plan has no such limit. */
export const current = {};

const NAMES = [
  'Pomelo-Mode', 'Credits-Remaining',
  'RateLimit-Limit', 'RateLimit-Remaining', 'RateLimit-Reset',
  'RateLimit-Limit-Concurrent', 'RateLimit-Remaining-Concurrent',
];
const TOKEN_NAMES = ['RateLimit-Limit-Tokens', 'RateLimit-Remaining-Tokens', 'RateLimit-Reset-Tokens'];

/** Forgets what is known of an earlier key. */
export function forgetLimits() {
  for (const name of [...NAMES, ...TOKEN_NAMES]) delete current[name];
}

/** Keeps the headers of a response; only those of text tasks have tokens. */
export function observe(headers) {
  if (!headers.get('X-Pomelo-Mode')) return;
  for (const name of NAMES) current[name] = headers.get(`X-${name}`);
  for (const name of TOKEN_NAMES) current[name] = headers.get(`X-${name}`) ?? current[name];
  limits.dispatchEvent(new Event('change'));
}
