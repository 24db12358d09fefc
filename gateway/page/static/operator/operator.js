// The operator's page: live load, providers, errors and spend from /metrics, the accounts and their keys.

import { facts, h, table } from './dom.js';
import { bytes, count, credits, time } from './format.js';
import { increase, Metrics } from './exposition.js';

const INTERVAL = 5000;
const CIRCUITS = ['closed', 'half-open', 'open'];

const live = h('div', { class: 'stack' });
const accounts = h('div', { class: 'stack' });
const keys = h('div', { class: 'stack' });
const state = document.getElementById('state');
let before = null;

document.getElementById('content').append(h('h1', {}, 'Operator'), live, accounts, keys);

/** Reads the metrics again and again while the page is open. */
async function follow() {
  try {
    const response = await fetch('metrics');
    if (response.ok) showMetrics({ at: Date.now(), metrics: new Metrics(await response.text()) });
    else show(`Error ${response.status}`, 'failed');
  } catch {
    show('No answer', 'failed');
  }
  setTimeout(follow, INTERVAL);
}

function showMetrics(now) {
  if (!live.contains(document.activeElement)) {  // the focus would be lost
    live.replaceChildren(load(now), providers(now.metrics), errors(now.metrics), spend(now.metrics));
  }
  before = now;
  const isOne = (name) => now.metrics.of(name).every(({ value }) => value);
  if (now.metrics.sum('pomelo_draining')) show('Draining', 'failed');  // its workers end one after the other
  else if (!isOne('pomelo_worker_up')) show('A worker does not answer', 'failed');  // its other metrics are missing
  else if (isOne('pomelo_ready')) show('Ready', 'done');
  else show('Not ready', 'failed');
}

function show(text, name) {
  state.textContent = text;
  state.parentElement.dataset.state = name;
}

function load({ at, metrics }) {
  const ended = metrics.sum('pomelo_tasks_total') ?? 0;
  const rate = before && increase('pomelo_tasks_total', before.metrics, metrics) / ((at - before.at) / 1000);
  const ofLimit = (protocol) => {
    const used = metrics.sum('pomelo_connections', (labels) => labels.protocol === protocol);
    return used === undefined ? null : `${count(used)} of ${count(metrics.sum('pomelo_connections_limit', (labels) => labels.protocol === protocol))}`;
  };
  const number = (name, format = count, matches = undefined) => {
    const value = metrics.sum(name, matches);
    return value === undefined ? null : format(value);
  };
  return section('Load', facts([
    ['Tasks running', number('pomelo_tasks_in_flight')],
    ['Calls running', number('pomelo_calls_in_flight')],
    ['Tasks per second', rate === null ? '…' : rate.toFixed(1)],
    ['Tasks since start', count(ended)],
    ['REST connections', ofLimit('rest')],
    ['gRPC connections', ofLimit('grpc')],
    ['Provider connections', number('pomelo_upstream_connections')],
    ['Waiting for a provider', number('pomelo_upstream_calls_waiting')],
    ['Live credits held', number('pomelo_held_credits', credits, ({ mode }) => mode === 'live')],
    ['Credits not collected', number('pomelo_uncollected_credits_total', credits)],
    ['Media', number('pomelo_media_stored_bytes', bytes)],
    ['Memory', number('process_resident_memory_bytes', bytes)],
    ['Workers', number('pomelo_worker_up')],
  ]));
}

function providers(metrics) {
  const circuits = metrics.of('pomelo_circuit_state');
  const names = new Set([...metrics.of('pomelo_tasks_total'), ...metrics.of('pomelo_attempts_failed_total'), ...circuits]
    .map(({ labels }) => labels.provider).filter(Boolean));
  const rows = [...names].sort().map((name) => {
    const isOf = (labels) => labels.provider === name;
    const failed = metrics.sum('pomelo_tasks_total', (labels) => isOf(labels) && !['ok', 'cancelled'].includes(labels.code)) ?? 0;
    const attempts = metrics.of('pomelo_attempts_failed_total', isOf).filter(({ value }) => value)
      .map(({ labels, value }) => `${count(value)} ${labels.code} (${labels.upstream_status})`);
    const open = circuits.filter(({ labels, value }) => isOf(labels) && value)
      .map(({ labels, value }) => `${labels.provider_model} ${CIRCUITS[value]}`);
    return [name, count(metrics.sum('pomelo_tasks_total', isOf) ?? 0), count(failed), attempts.join(', ') || 'none',
      open.length ? h('strong', { class: 'bad' }, open.join(', ')) : 'closed'];
  });
  return section('Providers', table('Providers', ['Provider', 'Tasks', 'Failed', 'Failed attempts', 'Circuit breaker'], rows, { numbers: [1, 2] }));
}

function errors(metrics) {
  const rows = metrics.by('code', 'pomelo_tasks_total', ({ code }) => code !== 'ok')
    .map(([code, tasks]) => [code, count(tasks), metrics.by('model', 'pomelo_tasks_total', (labels) => labels.code === code)
      .map(([model, value]) => `${model || 'unknown model'} ${count(value)}`).join(', ')]);
  return section('Errors', table('Errors', ['Code', 'Tasks', 'Models'], rows, { numbers: [1], empty: 'No task has failed since the start.' }));
}

function spend(metrics) {
  const of = (name, model, mode) => metrics.sum(name, (labels) => labels.model === model && labels.mode === mode) ?? 0;
  const models = metrics.by('model', 'pomelo_cost_credits_total').map(([model]) => model);
  const rows = models.map((model) => [model,
    ...['live', 'test'].map((mode) => credits(of('pomelo_cost_credits_total', model, mode))),
    count(metrics.sum('pomelo_input_tokens_total', (labels) => labels.model === model) ?? 0),
    count(metrics.sum('pomelo_output_tokens_total', (labels) => labels.model === model) ?? 0)]);
  return section('Spend since start', table('Spend since start', ['Model', 'Live credits', 'Test credits', 'Input tokens', 'Output tokens'], rows, { numbers: [1, 2, 3, 4], empty: 'No task has cost anything since the start.' }));
}

/** Reads a page of accounts or keys; shows why in `place` and returns null if they are not shown. Gateways have none. */
async function read(path, query, place, name) {
  const response = await fetch(`${path}?${new URLSearchParams(query)}`).catch(() => null);
  if (response?.ok) return response.json();
  if (response?.status !== 404) place.replaceChildren(section(name, h('p', {}, response ? await response.text() : 'The server does not answer.')));
  return null;
}

/** Returns the buttons of a list in `place`: `show` shows the page of a token. */
const turns = (place, token, next, show) => {
  const turnTo = (page, name) => h('button', { type: 'button', onclick: () => showAndFocus(place, () => show(page)) }, name);
  return h('div', { class: 'row' }, turnTo('', token ? 'First page' : 'Refresh'), next ? turnTo(next, 'Next page') : null);
};

/** Shows another list in `place`, in which the button that was pressed would be lost with the focus. */
async function showAndFocus(place, show) {
  await show();
  place.querySelector('h2').focus();
}

async function showAccounts(token = '') {
  const page = await read('accounts', { page_token: token }, accounts, 'Accounts');
  if (!page) return;
  const rows = page.data.map((account) => [
    [account.id, account.disabled ? h('span', { class: 'badge' }, 'disabled') : null], account.plan,
    ...[account.live, account.test].flatMap((balance) => [credits(balance.available), credits(balance.spent)]),
    h('button', { type: 'button', class: 'quiet', 'aria-label': `Keys of ${account.id}`,
      onclick: () => showAndFocus(keys, () => showKeys(account.id)) }, 'Keys')]);
  accounts.replaceChildren(section('Accounts',
    table('Accounts', ['Account', 'Plan', 'Live credits left', 'Live spent', 'Test credits left', 'Test spent', 'Keys'], rows, { numbers: [2, 3, 4, 5] }),
    turns(accounts, token, page.next_page_token, showAccounts)));
}

/** Shows a page of the keys of an account, or of all. */
async function showKeys(account = '', token = '') {
  const page = await read('keys', { account_id: account, page_token: token }, keys, 'Keys');
  if (!page) return;
  const date = (at, none) => (at === null ? none : time(at));
  const rows = page.data.map((key) => [
    [h('code', {}, key.id), h('small', {}, key.name)],
    key.account,
    h('span', { class: `badge ${key.mode}` }, key.mode),
    key.models?.join(', ') ?? 'all',
    key.budget ? `${key.budget_used} of ${key.budget}` : 'none',
    date(key.last_use, 'never'),
    date(key.expires, 'never'),
    key.state === 'active' ? key.state : h('strong', { class: 'bad' }, key.state)]);
  keys.replaceChildren(section('Keys',
    h('p', { class: 'dim' }, account ? `Those of ${account}. ` : '', 'This page only reads: ', h('code', {}, 'pomelo keys'), ' creates, limits, rotates and revokes keys.'),
    table('Keys', ['Key', 'Account', 'Mode', 'Models', 'Credits used of the budget', 'Last use', 'Expires', 'State'], rows),
    h('div', { class: 'row' }, turns(keys, token, page.next_page_token, (next) => showKeys(account, next)),
      account ? h('button', { type: 'button', onclick: () => showAndFocus(keys, () => showKeys()) }, 'Keys of all accounts') : null)));
}

const section = (name, ...content) =>
  h('section', { class: 'card stack', 'aria-label': name }, h('h2', { tabindex: -1 }, name), content);

follow();
showAccounts();
showKeys();
