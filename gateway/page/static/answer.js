// The answer to a task as it arrives, and what it took: cost, tokens, time, adjusted parameters.

import { get } from './api.js';
import { copyButton, facts, h } from './dom.js';
import { errorPanel } from './errors.js';
import { count, credits, seconds } from './format.js';
import { outputOf } from './outputs.js';

/** How a task is doing, for the panel's style and for tests. */
const STATES = { idle: 'Not run yet', running: 'Running…', done: 'Done', stopped: 'Stopped', failed: 'Failed' };

export class Answer {
  #output = null;
  #state = h('span', { class: 'state', role: 'status' });
  #content = h('div', { class: 'stack' });
  #facts = h('div', {});

  constructor() {
    this.element = h('section', { class: 'card stack answer', 'aria-label': 'Answer' },
      h('div', { class: 'row' }, h('h2', {}, 'Answer'), this.#state), this.#content, this.#facts);
    this.#content.append(h('p', { class: 'dim' }, 'The answer appears here. Test keys are answered by the sandbox.'));
    this.#set('idle');
  }

  #set(state) {
    this.element.dataset.state = state;
    this.#state.textContent = STATES[state];
  }

  begin(type, body, audioUrl) {
    this.started = performance.now();
    this.firstByte = null;
    this.id = null;
    this.body = body;
    this.#output = outputOf(type, body, audioUrl);
    this.#upload = null;
    this.#content.replaceChildren(this.#output.element);
    this.#facts.replaceChildren();
    this.#set('running');
  }

  #upload;

  /** Shows which share of a file has been sent. */
  uploaded(share) {
    if (!this.#upload) {
      this.#upload = h('progress', { max: 1, 'aria-label': 'Upload' });
      this.#content.prepend(this.#upload);
    }
    this.#upload.value = share;
  }

  accepted(headers) {
    this.headers = headers;
    this.#upload?.remove();
  }

  add(object) {
    this.firstByte ??= performance.now() - this.started;
    this.id = object.id;
    this.#output.add(object);
  }

  async finish(headers, result) {
    this.elapsed = performance.now() - this.started;
    this.id = result.id;
    this.#output.finish(result);
    this.#output.offer?.((detail) => this.element.dispatchEvent(new CustomEvent('continue', { detail })));
    this.#set('done');
    await this.#showFacts(headers, result.usage);
  }

  /** The caller has stopped it: what was delivered is charged. */
  async stopped() {
    this.elapsed = performance.now() - this.started;
    this.#upload?.remove();
    this.#output.stop();
    this.#set('stopped');
    if (this.id) await this.#showFacts(this.headers, null);
  }

  fail(error) {
    this.elapsed = performance.now() - this.started;
    this.#upload?.remove();
    this.#output.stop();
    if (!this.id) this.#output.element.remove();  // nothing was delivered
    this.#content.append(errorPanel(error, () => this.element.dispatchEvent(new Event('retry'))));
    this.#facts.replaceChildren(facts([
      ['Time', seconds(this.elapsed)],
      ['Cost', costOf(error)],
      ['Request', requestId(error.requestId)],
    ]));
    this.#set('failed');
    if (this.id) this.#showFacts(this.headers, null);
  }

  /** Shows what is wrong with the form; nothing was sent. */
  showInvalid(message) {
    this.#content.replaceChildren(h('div', { class: 'error', role: 'alert' }, h('p', {}, message)));
    this.#facts.replaceChildren();
    this.#set('failed');
  }

  async #showFacts(headers, usage) {
    const id = this.id;
    const isDone = this.element.dataset.state === 'done';
    const charged = isDone ? headers.get('X-Credits-Charged') : null;  // that of the complete result
    const show = (record, cost) => this.#facts.replaceChildren(facts([
      ['Cost', cost],
      ['Tokens', tokensOf(usage ?? tokenCounts(record))],
      ['Time', seconds(this.elapsed)],
      ['First byte', this.firstByte === null ? null : seconds(this.firstByte)],
      ['Adjusted', headers.get('X-Pomelo-Adjusted')],
      ['Replayed', headers.get('Idempotent-Replayed') && 'yes'],
      ['Id', h('code', {}, id)],
      ['Request', requestId(headers.get('X-Request-Id'))],
    ]));
    show(null, charged === null ? '…' : amount(charged));
    if (charged !== null) {
      await get('api/v1/account').catch(() => {});  // its headers have the limits after the task
      return;
    }
    const record = await findRecord(id);
    if (this.id === id) show(record, record ? amount(record.cost) : h('a', { href: '#/usage' }, 'see Usage'));
  }
}

const requestId = (id) => id && h('span', { class: 'id' }, h('code', {}, id), copyButton(() => id));

const amount = (cost) => `${credits(cost)} credits`;

/** Returns the cost of a task that failed without output; null: it is not known, as when its charge failed. */
function costOf({ charged, status }) {
  if (!status) return null;  // an event of a stream, whose headers have the cost of the complete result
  if (Number(charged)) return amount(charged);
  return charged !== null || (status >= 400 && status < 500) ? '0' : null;
}

const tokenCounts = (record) =>
  record?.type === 'text' ? { prompt_tokens: record.input_tokens, completion_tokens: record.output_tokens } : null;

function tokensOf(usage) {
  if (!usage) return null;
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return `${count(usage.prompt_tokens)} in${cached ? ` (${count(cached)} cached)` : ''}, ${count(usage.completion_tokens)} out`;
}

/** Returns the usage record of a task, or undefined; one of a stream or of a stopped task may take a moment. */
async function findRecord(id) {
  for (let attempt = 0; attempt < 8; attempt++) {
    await new Promise((resolve) => setTimeout(resolve, attempt * 400));
    const pages = await Promise.all(['false', 'true'].map((failed) => get('api/v1/usage', { page_size: 50, failed })))
      .catch(() => []);
    const record = pages.flatMap(({ data }) => data).find((each) => each.id === id);
    if (record) return record;
  }
  return undefined;
}
