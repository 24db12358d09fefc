// The view of models: prices and limits.

import { get } from './api.js';
import { h, labelled } from './dom.js';
import { count, words } from './format.js';

export async function models() {
  const { data } = await get('api/v1/models');
  const search = h('input', { type: 'search', oninput: () => show() });
  const rows = h('tbody');
  const show = () => rows.replaceChildren(...data
    .filter(({ id, type }) => `${id} ${words(type)}`.includes(search.value.trim().toLowerCase()))
    .map(row));
  show();
  return h('div', { class: 'stack' },
    h('div', { class: 'row' }, h('h1', {}, 'Models'), labelled('Search', search, '', 'end')),
    h('p', { class: 'dim' }, 'These are the models that your key may use. Prices are in credits: 1 credit is US$1 of the provider’s list price.'),
    h('div', { class: 'card scroll', tabindex: 0, role: 'region', 'aria-label': 'Models' },
      h('table', { class: 'models' },
        h('thead', {}, h('tr', {}, ['Model', 'Type', 'Price', 'Limits', ''].map((name) => h(name ? 'th' : 'td', name ? { scope: 'col' } : {}, name)))),
        rows)));
}

function row(model) {
  return h('tr', {},
    h('th', { scope: 'row' }, model.id,
      model.available ? null : h('span', { class: 'badge' }, 'no provider'),
      model.retires ? h('small', {}, `ends ${model.retires}`) : null),
    h('td', {}, words(model.type)),
    h('td', {}, prices(model.price), (model.price_tiers ?? []).map((tier) => h('div', {},
      h('small', {}, `From ${count(tier.from_input_tokens)} input tokens`), prices(tier.price)))),
    h('td', {}, pairs(Object.entries(model.limits).map(([name, value]) => [words(name), count(value)]))),
    h('td', {}, h('a', { class: 'button', href: `#/playground?model=${encodeURIComponent(model.id)}`, 'aria-label': `Try ${model.id}` }, 'Try')));
}

const prices = (price) => pairs(Object.entries(price).map(([unit, value]) => [`per ${words(unit)}`, value]));

const pairs = (rows) => h('ul', { class: 'pairs' }, rows.map(([name, value]) => h('li', {}, h('span', {}, value), ' ', h('small', {}, name))));
