// The view of models: prices and limits.

import { get } from './api.js';
import { h, labelled, table } from './dom.js';
import { count, words } from './format.js';

export async function models() {
  const { data } = await get('api/v1/models');
  const search = h('input', { type: 'search', oninput: () => show() });
  const list = h('div', { class: 'card' });
  const show = () => {
    const text = search.value.trim().toLowerCase();
    const found = data.filter(({ id, type }) => `${id} ${words(type)}`.includes(text));
    list.replaceChildren(table('Models', ['Model', 'Price', 'Limits', 'Playground'], found.map(row), {
      className: 'models', empty: data.length ? 'No model has this name or type.' : 'This key may not use any model.',
    }));
  };
  show();
  return h('div', { class: 'stack' },
    h('div', { class: 'row title' }, h('h1', {}, 'Models'), labelled('Search', search, '', 'end')),
    h('p', { class: 'dim' }, 'These are the models that your key may use. Prices are in credits: 1 credit is US$1 of the provider’s list price.'),
    list);
}

const row = (model) => [
  [model.id,
    model.available ? null : h('span', { class: 'badge' }, 'no provider'),
    h('small', {}, words(model.type)),
    model.retires ? h('small', {}, `ends ${model.retires}`) : null],
  h('div', { class: 'prices' }, prices(model.price), (model.price_tiers ?? []).map((tier) =>
    prices(tier.price, `From ${count(tier.from_input_tokens)} input tokens`))),
  pairs(Object.entries(model.limits).map(([name, value]) => [words(name), count(value)])),
  h('a', { class: 'button', href: `#/playground?model=${encodeURIComponent(model.id)}`, 'aria-label': `Try ${model.id}` }, 'Try'),
];

const prices = (price, title = '') => h('div', {},
  title && h('small', {}, title),
  pairs(Object.entries(price).map(([unit, value]) => [`per ${words(unit)}`, value])));

const pairs = (rows) => h('ul', { class: 'pairs' }, rows.map(([name, value]) => h('li', {}, h('span', {}, value), ' ', h('small', {}, name))));
