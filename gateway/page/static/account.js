// The view of the account: its plan, limits and credits, this key, and what each key has used.

import { get } from './api.js';
import { facts, h } from './dom.js';
import { count, credits, words } from './format.js';

export async function account(query, { key, signOut }) {
  const [details, { data: keys }] = await Promise.all([get('api/v1/account'), get('api/v1/usage', { group_by: 'key' })]);
  const own = key.split('_')[2];
  return h('div', { class: 'stack' },
    h('h1', {}, 'Account'),
    h('div', { class: 'columns even' },
      h('section', { class: 'card stack', 'aria-label': 'Credits' }, h('h2', {}, 'Credits'),
        facts(['available', 'granted', 'spent', 'held', 'credit_limit']
          .map((name) => [words(name), details.credits[name] === undefined ? null : credits(details.credits[name])])),
        h('p', { class: 'dim' }, 'Held is the maximum cost of the tasks that are running.')),
      h('section', { class: 'card stack', 'aria-label': 'Plan' }, h('h2', {}, 'Plan'), facts([
        ['Account', details.id],
        ['Mode', details.mode],
        ['Plan', details.plan],
        ['Requests per minute', limit(details.limits.requests_per_minute)],
        ['Concurrent tasks', limit(details.limits.concurrent_requests)],
        ['Tokens per minute of each text model', limit(details.limits.tokens_per_minute)],
        ['Models', details.limits.models?.join(', ') ?? 'all'],
      ]))),
    h('section', { class: 'card stack', 'aria-label': 'Keys' },
      h('div', { class: 'row' }, h('h2', {}, 'Keys'),
        h('button', { type: 'button', class: 'end', onclick: signOut }, 'Forget this key')),
      h('p', { class: 'dim' }, `You use the key ${own}. This browser has it only until the tab is closed, unless you chose to remember it. `,
        'The table shows the keys of the account that have been used in this mode. Your operator creates and revokes keys.'),
      h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Usage by key' },
        h('table', {},
          h('thead', {}, h('tr', {}, ['Key', 'Tasks', 'Cost'].map((name, i) => h('th', { scope: 'col', class: i && 'number' }, name)))),
          h('tbody', {}, keys.length ? keys.map((each) => h('tr', {},
            h('th', { scope: 'row' }, h('code', {}, each.group), each.group === own ? h('span', { class: 'badge' }, 'this key') : null),
            h('td', { class: 'number' }, count(each.tasks)),
            h('td', { class: 'number' }, credits(each.cost)))) : h('tr', {}, h('td', { colspan: 3 }, 'No task has run yet.')))))));
}

const limit = (value) => (value === null ? 'no limit' : count(value));
