// The view of the account: its plan, limits and credits, this key, and what each key has used.

import { get } from './api.js';
import { facts, h, table } from './dom.js';
import { count, credits, time, words } from './format.js';

/** Keys whose last use is looked up, by a request each. */
const MAX_LOOKUPS = 10;

export async function account(query, { key, signOut }) {
  const own = key.split('_')[2];
  const [details, { data: models }, { data: keys }] = await Promise.all([
    get('api/v1/account'), get('api/v1/models'), get('api/v1/usage', { group_by: 'key' })]);
  const lastUses = new Map(await Promise.all([...keys].sort((a, b) => (b.group === own) - (a.group === own) || b.cost - a.cost)
    .slice(0, MAX_LOOKUPS).map(async ({ group }) => [group, await lastUse(group)])));
  const used = keys.find(({ group }) => group === own) ?? { tasks: 0, cost: 0 };
  return h('div', { class: 'stack' },
    h('h1', {}, 'Account'),
    h('div', { class: 'cards' },
      card('Credits', facts(['available', 'granted', 'spent', 'held', 'credit_limit']
        .map((name) => [words(name), details.credits[name] === undefined ? null : credits(details.credits[name])])),
        h('p', { class: 'hint' }, 'Held is the maximum cost of the tasks that are running.')),
      card('Plan', facts([
        ['Account', details.id],
        ['Plan', details.plan],
        ['Requests per minute', limit(details.limits.requests_per_minute)],
        ['Concurrent tasks', limit(details.limits.concurrent_requests)],
        ['Tokens per minute of each text model', limit(details.limits.tokens_per_minute)],
        ['Models', details.limits.models?.join(', ') ?? 'all'],
      ])),
      card('This key', facts([
        ['Key', h('code', {}, own)],
        ['Mode', details.mode],
        ['Models', h('a', { href: '#/models' }, models.length === 1 ? models[0].id : `${count(models.length)} models`)],
        ['Tasks', count(used.tasks)],
        ['Cost', credits(used.cost)],
        ['Last use', lastUses.get(own) ?? 'never'],
      ]),
      h('p', { class: 'hint' }, 'This browser has the key only until the tab is closed, unless you chose to remember it.'),
      h('button', { type: 'button', onclick: signOut }, 'Forget this key'))),
    card('Keys of the account',
      h('p', { class: 'dim' }, `The keys that have been used in ${details.mode} mode. Your operator creates, limits and revokes keys, and knows their names, budgets and expiry.`),
      table('Usage by key', ['Key', 'Tasks', 'Cost', 'Last use', 'Usage'], keys.map(({ group, tasks, cost }) => [
        [h('code', {}, group), group === own ? h('span', { class: 'badge' }, 'this key') : null],
        count(tasks), credits(cost), lastUses.get(group) ?? '–',
        h('a', { href: `#/usage?key=${group}`, 'aria-label': `Show the usage of ${group}` }, 'Show'),
      ]), { numbers: [1, 2], empty: 'No task has run yet.' })));
}

/** Returns when a key ran its last task, as text; undefined: it ran none that was billed. */
async function lastUse(keyId) {
  const { data: [record] } = await get('api/v1/usage', { key_id: keyId, page_size: 1 });
  return record && time(record.time);
}

const card = (name, ...content) => h('section', { class: 'card stack', 'aria-label': name }, h('h2', {}, name), content);

const limit = (value) => (value === null ? 'no limit' : count(value));
