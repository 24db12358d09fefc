// Errors: the message, the code, what to do, and when to try again.

import { h } from './dom.js';

/** What to do about a code, in addition to what its message says. */
const ADVICE = {
  invalid_api_key: 'Check the key. Your operator may have revoked it, or it may have expired.',
  model_not_allowed: 'Choose another model, or ask your operator for a plan or a key that allows this one.',
  invalid_body: 'Correct the body of the request, or send less.',
  missing_parameter: 'Fill in the field that the message names.',
  invalid_parameter: 'Change the field that the message names.',
  unsupported_model: 'Choose a model of the list.',
  context_length_exceeded: 'Shorten the messages, or choose a model with a longer context.',
  content_policy_violation: 'Rephrase the request. It is refused again if it stays the same.',
  payload_too_large: 'Send a smaller file or body, or wait until stored media expire.',
  rate_limit_exceeded: 'Wait until the window ends.',
  token_limit_exceeded: 'Wait until the window ends, or use fewer tokens.',
  concurrency_limit_exceeded: 'Wait until a running task ends.',
  insufficient_credits: 'Set max_tokens or choose a cheaper model, or ask your operator for credits.',
  idempotency_conflict: 'Wait until the first request ends.',
  idempotency_mismatch: 'Use another Idempotency-Key for another request.',
  provider_not_configured: 'Ask your operator to configure the provider, or choose another model.',
  provider_unavailable: 'Try again, or choose another model.',
  provider_failed: 'Try again. If it happens again, report the request id to your operator.',
  deadline_exceeded: 'Try again, or ask for less output.',
  overloaded: 'Try again in a moment.',
  store_unavailable: 'Try again in a moment.',
  shutting_down: 'Try again: another server takes over.',
  server_unavailable: 'Try again in a moment.',
  internal_error: 'Report the request id to your operator.',
  not_found: 'Reload the page. If it happens again, your operator’s proxy may change paths.',
  method_not_allowed: 'Reload the page. If it happens again, your operator’s proxy may change requests.',
  unsupported_media_type: 'Reload the page. If it happens again, your operator’s proxy may change requests.',
  no_answer: 'Check your connection, and that the server runs.',
  incomplete: 'Try again. What was delivered may have been charged.',
};

const RETRYABLE = new Set([
  'rate_limit_exceeded', 'token_limit_exceeded', 'concurrency_limit_exceeded', 'idempotency_conflict',
  'provider_unavailable', 'provider_failed', 'deadline_exceeded', 'overloaded', 'store_unavailable', 'shutting_down',
  'server_unavailable', 'no_answer', 'incomplete',
]);

const OF_A_PROXY = 'A proxy between you and the server may have answered. Try again, or report it to your operator.';

const isOfAProxy = (code) => code.startsWith('http_');

/**
 * Returns what an error says, and what to do. Its button calls `retry` once Retry-After has passed, or asks the page
 * for another key by the event `signout`.
 */
export function errorPanel(error, retry = null) {
  const { code, message, status, retryAfter } = error;
  const advice = isOfAProxy(code) ? OF_A_PROXY : ADVICE[code];
  const panel = h('div', { class: 'error', role: 'alert' },
    h('p', { class: 'message' }, message),
    advice ? h('p', {}, advice) : null,
    h('p', { class: 'dim' }, h('code', {}, code), status ? ` · HTTP ${status}` : ''));
  if (retry && (RETRYABLE.has(code) || isOfAProxy(code))) panel.append(retryButton(retryAfter, retry));
  if (retry && code === 'invalid_api_key') {
    panel.append(h('button', { type: 'button', onclick: () => panel.dispatchEvent(new Event('signout', { bubbles: true })) }, 'Enter another key'));
  }
  return panel;
}

function retryButton(wait, retry) {
  const button = h('button', { type: 'button', onclick: retry }, 'Try again');
  const at = Date.now() + wait * 1000;
  const show = () => {
    const left = Math.ceil((at - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : 'Try again';
    if (left > 0) setTimeout(show, 250);
  };
  show();
  return button;
}
