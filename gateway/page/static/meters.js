// The live limits and credits of the key, from the headers of the latest response.

import { h } from './dom.js';
import { count, credits } from './format.js';
import { current, limits } from './limits.js';

const METERS = [
  ['Requests this minute', 'RateLimit-Limit', 'RateLimit-Remaining', 'RateLimit-Reset'],
  ['Concurrent tasks', 'RateLimit-Limit-Concurrent', 'RateLimit-Remaining-Concurrent'],
  ['Tokens this minute', 'RateLimit-Limit-Tokens', 'RateLimit-Remaining-Tokens', 'RateLimit-Reset-Tokens'],
];

/** Returns a strip with what remains of each limit of the plan. */
export function limitMeters() {
  const strip = h('section', { class: 'meters', 'aria-label': 'Limits and credits' });
  const show = () => strip.replaceChildren(...METERS.map(meter), creditsLeft());
  setInterval(show, 1000);  // windows end
  limits.addEventListener('change', show);
  show();
  return strip;
}

function meter([name, limitName, remainingName, resetName]) {
  const limit = Number(current[limitName]);
  if (!current[limitName]) return '';
  const left = Number(current[resetName]) - Date.now() / 1000;
  const isOver = resetName && left <= 0;  // the window has ended: all of the limit is there again
  const remaining = isOver ? limit : Number(current[remainingName]);
  return h('div', {},
    h('span', { class: 'name' }, name),
    h('meter', { min: 0, max: limit, low: limit * 0.2, optimum: limit, value: String(remaining), 'aria-label': `${name}: left` }),
    h('span', {}, `${count(remaining)} of ${count(limit)} left`,
      resetName && !isOver && remaining < limit ? h('span', { class: 'dim' }, `, resets in ${Math.max(1, Math.floor(left))} s`) : null));
}

function creditsLeft() {
  const value = current['Credits-Remaining'];
  if (value == null) return '';
  return h('div', {}, h('span', { class: 'name' }, 'Credits'), h('span', { class: 'amount' }, credits(value)));
}
