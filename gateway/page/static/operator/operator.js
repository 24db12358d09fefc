// The operator's page: live load, providers, errors and spend from /metrics, and the accounts.

import { facts, h } from './dom.js';
import { bytes, count, credits } from './format.js';
import { Metrics } from './exposition.js';

const INTERVAL = 5000;
const CIRCUITS = ['closed', 'half-open', 'open'];

const live = h('div', { class: 'stack' });
const accounts = h('div', { class: 'stack' });
const state = document.getElementById('state');
let before = null;

document.getElementById('content').append(h('h1', {}, 'Operator'), live, accounts);

/** Reads the metrics again and again while the page is open. */
async function follow() {
  try {
    const response = await fetch('metrics');
    const now = { at: Date.now(), metrics: new Metrics(await response.text()) };
    if (!live.contains(document.activeElement)) {  // the focus would be lost
      live.replaceChildren(load(now), providers(now.metrics), errors(now.metrics), spend(now.metrics));
    }
    before = now;
    const isReady = now.metrics.of('pomelo_ready').every(({ value }) => value);
    show(isReady ? 'Ready' : 'Not ready', isReady ? 'done' : 'failed');
  } catch {
    show('No answer', 'failed');
  }
  setTimeout(follow, INTERVAL);
}

function show(text, name) {
  state.textContent = text;
  state.parentElement.dataset.state = name;
}

function load({ at, metrics }) {
  const ended = metrics.sum('pomelo_tasks_total') ?? 0;
  const rate = before && (ended - (before.metrics.sum('pomelo_tasks_total') ?? 0)) / ((at - before.at) / 1000);
  const ofLimit = (protocol) => {
    const used = metrics.sum('pomelo_connections', (labels) => labels.protocol === protocol);
    return used === undefined ? null : `${count(used)} of ${count(metrics.sum('pomelo_connections_limit', (labels) => labels.protocol === protocol))}`;
  };
  const number = (name, format = count) => {
    const value = metrics.sum(name);
    return value === undefined ? null : format(value);
  };
  return section('Load', facts([
    ['Tasks running', number('pomelo_tasks_in_flight')],
    ['Calls running', number('pomelo_calls_in_flight')],
    ['Tasks per second', rate === null ? '…' : rate.toFixed(1)],
    ['Tasks since start', count(ended)],
    ['Connections of REST', ofLimit('rest')],
    ['Connections of gRPC', ofLimit('grpc')],
    ['Connections to providers', number('pomelo_upstream_connections')],
    ['Calls waiting for one', number('pomelo_upstream_calls_waiting')],
    ['Credits held', number('pomelo_held_credits', credits)],
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
  return section('Providers', table(['Provider', 'Tasks', 'Failed', 'Failed attempts', 'Circuit breaker'], rows, [1, 2]));
}

function errors(metrics) {
  const rows = metrics.by('code', 'pomelo_tasks_total', ({ code }) => code !== 'ok')
    .map(([code, tasks]) => [code, count(tasks), metrics.by('model', 'pomelo_tasks_total', (labels) => labels.code === code)
      .map(([model, value]) => `${model || 'unknown model'} ${count(value)}`).join(', ')]);
  return section('Errors', table(['Code', 'Tasks', 'Models'], rows, [1]));
}

function spend(metrics) {
  const of = (name, model, mode) => metrics.sum(name, (labels) => labels.model === model && labels.mode === mode) ?? 0;
  const models = metrics.by('model', 'pomelo_cost_credits_total').map(([model]) => model);
  const rows = models.map((model) => [model,
    ...['live', 'test'].map((mode) => credits(of('pomelo_cost_credits_total', model, mode))),
    count(metrics.sum('pomelo_input_tokens_total', (labels) => labels.model === model) ?? 0),
    count(metrics.sum('pomelo_output_tokens_total', (labels) => labels.model === model) ?? 0)]);
  return section('Spend since start', table(['Model', 'Live credits', 'Test credits', 'Input tokens', 'Output tokens'], rows, [1, 2, 3, 4]));
}

/** Shows a page of the accounts; gateways have none. */
async function showAccounts(token = '') {
  const response = await fetch(`accounts?${new URLSearchParams({ page_token: token })}`);
  if (response.status === 404) return;
  if (!response.ok) {
    accounts.replaceChildren(section('Accounts', h('p', {}, await response.text())));
    return;
  }
  const { data, next_page_token: next } = await response.json();
  const rows = data.map((account) => [
    [account.id, account.disabled ? h('span', { class: 'badge' }, 'disabled') : null], account.plan,
    ...[account.live, account.test].flatMap((balance) => [credits(balance.available), credits(balance.spent)])]);
  accounts.replaceChildren(section('Accounts',
    table(['Account', 'Plan', 'Live credits left', 'Live spent', 'Test credits left', 'Test spent'], rows, [2, 3, 4, 5]),
    h('div', { class: 'row' },
      h('button', { type: 'button', onclick: () => showAccounts() }, token ? 'First page' : 'Refresh'),
      next ? h('button', { type: 'button', onclick: () => showAccounts(next) }, 'Next page') : null)));
}

const section = (name, ...content) => h('section', { class: 'card stack', 'aria-label': name }, h('h2', {}, name), content);

function table(names, rows, numbers) {
  if (!rows.length) return h('p', { class: 'dim' }, 'None.');
  const style = (i) => numbers.includes(i) && 'number';
  return h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': `${names[0]}s` }, h('table', {},
    h('thead', {}, h('tr', {}, names.map((name, i) => h('th', { scope: 'col', class: style(i) }, name)))),
    h('tbody', {}, rows.map(([first, ...rest]) => h('tr', {}, h('th', { scope: 'row' }, first),
      rest.map((value, i) => h('td', { class: style(i + 1) }, value)))))));
}

follow();
showAccounts();
