// The view of usage: totals by day and model as charts, and the tasks as a table with filters and pages.

import { get } from './api.js';
import { dailyChart } from './chart.js';
import { facts, h, labelled, table } from './dom.js';
import { errorPanel } from './errors.js';
import { bytes, count, credits, seconds, time } from './format.js';

const DAY = 86_400_000;
const MAX_SERIES = 5;
const MAX_DAYS = 366;
const PAGE_SIZE = 25;
const isoDate = (at) => new Date(at).toISOString().slice(0, 10);

const METRICS = {
  cost: ['Cost (credits)', (total) => total.cost, credits],
  tasks: ['Tasks', (total) => total.tasks, count],
  tokens: ['Tokens', (total) => total.input_tokens + total.output_tokens, count],
};

export async function usage(query) {
  const view = new UsageView(query.get('key') ?? '');
  view.refresh();  // the chart needs the width of the view once it is shown
  return view.element;
}

class UsageView {
  #from = h('input', { type: 'date', value: isoDate(Date.now() - 29 * DAY) });
  #to = h('input', { type: 'date', value: isoDate(Date.now()) });
  #model = h('select', {}, h('option', { value: '' }, 'All models'));
  #key = h('select', {}, h('option', { value: '' }, 'All keys'));
  #outcome = h('select', {}, h('option', { value: 'false' }, 'Billed'), h('option', { value: 'true' }, 'Failed'));
  #metric = h('select', { 'aria-label': 'Shown in the chart', onchange: () => this.#draw() },
    Object.entries(METRICS).map(([name, [label]]) => h('option', { value: name }, label)));
  #chart = h('div', {}, loading());
  #table = h('div', {}, loading());
  #turn = 0;  // of the latest refresh
  #totals = null;  // as long as they are not known for the filters
  #series = [];

  /** `key` is the id of the key that is shown first; empty: all. */
  constructor(key) {
    offer(this.#key, [key]);
    this.#key.value = key;
    const refresh = () => this.refresh();
    const redraw = () => {
      if (this.element.isConnected) this.#draw();
      else removeEventListener('themechange', redraw);
    };
    addEventListener('themechange', redraw);
    this.element = h('div', { class: 'stack' },
      h('h1', {}, 'Usage'),
      h('form', { class: 'card filters', 'aria-label': 'Filters', onchange: refresh, onsubmit: (event) => event.preventDefault() },
        labelled('From', this.#from), labelled('To', this.#to), labelled('Model', this.#model),
        labelled('Key', this.#key), labelled('Outcome', this.#outcome)),
      h('section', { class: 'card stack', 'aria-label': 'By day and model' },
        h('div', { class: 'row' }, h('h2', {}, 'By day and model'), h('span', { class: 'end' }, this.#metric)), this.#chart),
      h('section', { class: 'card stack', 'aria-label': 'Tasks' }, h('h2', {}, 'Tasks'), this.#table));
  }

  get #filters() {
    const to = this.#to.value && isoDate(Date.parse(this.#to.value) + DAY);
    return { from: this.#from.value, to, model: this.#model.value, key_id: this.#key.value, failed: this.#outcome.value };
  }

  /** Reads the usage that the filters select, and drops what an earlier refresh has not shown yet. */
  async refresh() {
    const turn = ++this.#turn;
    this.#totals = null;
    if (this.#outcome.value === 'true' && this.#metric.value === 'cost') this.#metric.value = 'tasks';  // they cost nothing
    await this.#load(turn, this.#chart, () => this.#readTotals(), (found) => this.#showTotals(found));
    await this.#showPage(turn, ['']);
  }

  /** Shows in `place` what `read` returns, unless the filters have changed since the refresh `turn`. */
  async #load(turn, place, read, show) {
    if (turn !== this.#turn) return;
    try {
      const found = await read();
      if (turn === this.#turn) await show(found);
    } catch (error) {
      if (turn !== this.#turn) return;
      place.replaceChildren(errorPanel(error, async () => {
        await this.refresh();
        document.getElementById('content').focus();  // the button has disappeared
      }));
    }
  }

  async #readTotals() {
    const filters = this.#filters;
    const by = async (group_by) => (await get('api/v1/usage', { ...filters, group_by })).data;
    const [totals, keys] = await Promise.all([by('model'), by('key')]);
    const models = totals.sort((a, b) => b.cost - a.cost || b.tasks - a.tasks);
    const series = [];
    for (const { group } of models.slice(0, MAX_SERIES)) {
      const { data: days } = await get('api/v1/usage', { ...filters, model: group, group_by: 'day' });
      series.push([group, days]);
    }
    if (models.length > MAX_SERIES) {
      const days = await by('day');
      series.push(['other models', days.map((day) => without(day, series))]);
    }
    return { models, keys, series };
  }

  async #showTotals({ models, keys, series }) {
    offer(this.#model, models.map(({ group }) => group));
    offer(this.#key, keys.map(({ group }) => group));
    this.#totals = models;
    this.#series = series;
    await this.#draw();
  }

  async #draw() {
    const totals = this.#totals;
    if (!totals) return;
    const [label, value, format] = METRICS[this.#metric.value];
    if (!totals.length) {
      this.#chart.replaceChildren(h('p', { class: 'dim' }, 'No task in this period.'));
      return;
    }
    const days = [];
    const last = Date.parse(this.#to.value || isoDate(Date.now()));
    const earliest = this.#series.flatMap(([, each]) => each.map(({ group }) => group)).sort()[0];
    const first = Math.max(Date.parse(this.#from.value || earliest), last - MAX_DAYS * DAY);
    for (let day = first; day <= last; day += DAY) days.push(isoDate(day));
    const rows = this.#series.map(([name, each]) => {
      const byDay = new Map(each.map((total) => [total.group, value(total)]));
      return { name, values: days.map((day) => byDay.get(day) ?? 0) };
    });
    const place = h('div', { class: 'stack' });  // its own: while uPlot is loaded, it may be drawn again
    this.#chart.replaceChildren(place);
    await dailyChart(place, days, rows, label, format);
    place.append(...totalsOf(totals));
  }

  /** Shows the last page of those with these tokens. */
  async #showPage(turn, tokens) {
    const query = { ...this.#filters, page_size: PAGE_SIZE, page_token: tokens.at(-1) };
    await this.#load(turn, this.#table, () => get('api/v1/usage', query), ({ data, next_page_token: next }) => {
      const isFailed = query.failed === 'true';
      const turnTo = (name, isPossible, others) => h('button', { type: 'button', disabled: !isPossible, onclick: async () => {
        await this.#showPage(turn, others);
        this.#table.querySelector('.scroll')?.focus();
      } }, name);
      this.#table.replaceChildren(
        recordsTable(data, isFailed),
        h('div', { class: 'row' },
          turnTo('Newer', tokens.length > 1, tokens.slice(0, -1)),
          h('span', { class: 'dim' }, `Page ${tokens.length}`),
          turnTo('Older', next, [...tokens, next])));
    });
  }
}

const loading = () => h('p', { class: 'dim' }, 'Loading…');

/** Adds what a filter does not offer yet. */
function offer(select, values) {
  const known = new Set([...select.options].map(({ value }) => value));
  select.append(...values.filter((value) => !known.has(value)).map((value) => h('option', { value }, value)));
}

/** Returns a day's totals without those of some models. */
function without(day, series) {
  const rest = { ...day };
  for (const [, days] of series) {
    const other = days.find(({ group }) => group === day.group);
    for (const name of ['cost', 'tasks', 'input_tokens', 'output_tokens']) rest[name] -= other?.[name] ?? 0;
  }
  return rest;
}

/** Returns the sums of all models, and those of each. */
function totalsOf(totals) {
  const sum = (name) => totals.reduce((all, total) => all + total[name], 0);
  return [
    facts([
      ['Cost', `${credits(sum('cost'))} credits`],
      ['Tasks', count(sum('tasks'))],
      ['Input tokens', count(sum('input_tokens'))],
      ['Output tokens', count(sum('output_tokens'))],
    ]),
    h('details', {}, h('summary', {}, 'Totals by model'),
      table('Totals by model', ['Model', 'Tasks', 'Input tokens', 'Output tokens', 'Cost'], totals.map((total) =>
        [total.group, count(total.tasks), count(total.input_tokens), count(total.output_tokens), credits(total.cost)]),
      { numbers: [1, 2, 3, 4] })),
  ];
}

function recordsTable(records, isFailed) {
  const names = ['Time', 'Model', isFailed ? 'Error' : 'Output', 'Used', 'Took', 'Cost'];
  const rows = records.map((record) => [
    time(record.time),
    h('span', { title: record.id }, record.model),
    isFailed ? h('code', {}, record.code) : `${bytes(record.output_bytes)}${record.complete ? '' : ', interrupted'}`,
    used(record),
    seconds(record.processing_ms),
    credits(record.cost)]);
  const empty = isFailed ? 'No task failed in this period.' : 'No task in this period.';
  return table('Tasks', names, rows, { numbers: [3, 4, 5], header: 1, className: 'records', empty });
}

/** Returns what a record was charged for. */
function used(record) {
  if (record.images) return `${count(record.images)} image${record.images > 1 ? 's' : ''}`;
  if (record.characters) return `${count(record.characters)} characters`;
  if (record.audio_seconds) return `${record.audio_seconds.toFixed(1)} s of audio`;
  return `${count(record.input_tokens)} + ${count(record.output_tokens)} tokens`;
}
