// The view that runs tasks: a form for the model's task type, the answer, and the request as code.

import { get, runTask } from './api.js';
import { Answer } from './answer.js';
import { AudioInput } from './audio.js';
import { CodePanel } from './code.js';
import { Conversation } from './conversation.js';
import { h, labelled } from './dom.js';
import { InvalidField, field, isFree, readAll } from './fields.js';
import { words } from './format.js';
import { limitMeters } from './meters.js';

const PRESETS = { prompt: 'A pomelo on a wooden table, morning light', text: 'Hello! This is Pomelo speaking.', voice: 'adam' };

/** Returns the name of a task type's schema: that of text-to-speech is TextToSpeechTask. */
const schemaName = (type) => `${type.split('-').map((word) => word[0].toUpperCase() + word.slice(1)).join('')}Task`;

let opened = { key: '', view: null };

/** Returns the view, as it was left if the key is the same. `query` may name the model. */
export async function playground(query, { key }) {
  if (opened.key !== key) {
    const [{ data: models }, { components }] = await Promise.all([get('api/v1/models'), get('openapi.json')]);
    const known = models.filter(({ type }) => components.schemas[schemaName(type)]);
    opened = { key, view: new Playground(known, components.schemas) };
  }
  opened.view.choose(query.get('model'));
  return opened.view.element;
}

/** The fields of a task type: the required ones, then the others as parameters. */
class TaskForm {
  audio = null;
  conversation = null;
  #fields = [];

  constructor(schema, schemas) {
    const required = new Set(schema.required);
    const main = [];
    const more = [];
    for (const [name, declared] of Object.entries(schema.properties)) {
      if (name === 'model' || name === 'stream' || !isFree(declared)) continue;
      const part = this.#field(name, declared, schemas);
      if (part.input && PRESETS[name] && required.has(name)) part.input.value = PRESETS[name];
      (required.has(name) ? main : more).push(part.element);
      if (name !== 'audio') this.#fields.push([name, part]);
    }
    this.elements = [h('div', { class: 'grid' }, main),
      h('details', { class: 'parameters' }, h('summary', {}, 'Parameters'), h('div', { class: 'grid' }, more))];
  }

  #field(name, declared, schemas) {
    if (name === 'messages') return this.conversation = new Conversation();
    if (name === 'audio') return this.audio = new AudioInput();
    return field(name, declared, schemas);
  }

  /** Returns the values of the fields; throws an InvalidField. */
  read() {
    return readAll(this.#fields);
  }
}

class Playground {
  #abort = null;
  #forms = new Map();  // by schema: another type of model does not discard what was entered
  #fields = null;

  constructor(models, schemas) {
    this.models = new Map(models.map((model) => [model.id, model]));
    this.schemas = schemas;
    this.model = h('select', { name: 'model', onchange: () => this.#showModel() }, groups(models));
    this.inputs = h('div', { class: 'stack' });
    this.stream = h('input', { type: 'checkbox', checked: true, id: 'stream' });
    this.run = h('button', { class: 'primary', type: 'submit' }, 'Run');
    this.stop = h('button', { type: 'button', disabled: true, onclick: () => this.#abort.abort() }, 'Stop');
    this.answer = new Answer();
    this.answer.element.addEventListener('retry', () => this.form.requestSubmit());
    this.answer.element.addEventListener('continue', ({ detail }) => this.#continue(detail));
    this.code = new CodePanel();
    this.form = h('form', { class: 'card stack', 'aria-label': 'Request', novalidate: true,
      onsubmit: (event) => { event.preventDefault(); this.#run(); },
      oninput: () => this.#showCode(),
    },
      labelled('model', this.model),
      this.inputs,
      h('div', { class: 'row actions' }, this.run, this.stop,
        h('label', { class: 'check', for: 'stream' }, this.stream, 'Stream')));
    this.element = h('div', {},
      h('h1', { class: 'hidden' }, 'Playground'),
      limitMeters(),
      h('div', { class: 'columns' }, this.form, h('div', { class: 'stack' }, this.answer.element, this.code.element)));
    this.choose(models.find(({ type, available }) => type === 'text' && available)?.id);
  }

  /** Chooses a model, if there is one of this name. */
  choose(name) {
    if (this.models.has(name)) this.model.value = name;
    this.#showModel();
  }

  #showModel() {
    const model = this.models.get(this.model.value);
    if (!model) {
      this.inputs.replaceChildren(h('p', {}, 'This key may not use any model.'));
      this.run.disabled = this.stream.disabled = true;
      return;
    }
    this.#showForm(this.schemas[schemaName(model.type)]);
    this.#showCode();
  }

  #showForm(schema) {
    if (!this.#forms.has(schema)) this.#forms.set(schema, new TaskForm(schema, this.schemas));
    const fields = this.#forms.get(schema);
    if (fields === this.#fields) return;
    this.#fields?.audio?.stop();
    this.#fields = fields;
    this.inputs.replaceChildren(...fields.elements);
  }

  /** Returns the request's body; throws an InvalidField. */
  #body() {
    return { model: this.model.value, ...this.#fields.read(), ...(this.stream.checked ? { stream: true } : {}) };
  }

  #showCode() {
    const { audio, conversation } = this.#fields;
    try {
      const { type } = this.models.get(this.model.value);
      this.code.show(type, this.#body(), audio ? audio.file ?? new File([], 'input.mp3') : null,
        conversation?.images ?? []);
    } catch (error) {
      if (!(error instanceof InvalidField)) throw error;
    }
  }

  async #run() {
    if (this.#abort) return;
    let body;
    let file = null;
    try {
      body = this.#body();
      file = this.#fields.audio?.read() ?? null;
    } catch (error) {
      if (!(error instanceof InvalidField)) throw error;
      this.answer.showInvalid(error.message);
      return;
    }
    this.#showCode();
    this.#abort = new AbortController();
    this.#setRunning(true);
    const { type } = this.models.get(body.model);
    this.answer.begin(type, body, this.#fields.audio?.url);
    try {
      const { headers, result } = await runTask(body, file, {
        signal: this.#abort.signal,
        onHead: (head) => this.answer.accepted(head),
        onEvent: (object) => this.answer.add(object),
        onUpload: (share) => this.answer.uploaded(share),
      });
      this.answer.finish(headers, result);
    } catch (error) {
      if (error.name === 'AbortError') this.answer.stopped();
      else this.answer.fail(error);
    } finally {
      this.#abort = null;
      this.#setRunning(false);
    }
  }

  #setRunning(isRunning) {
    const focused = document.activeElement;  // a button of the answer is removed when a task begins
    const isLost = [this.run, this.stop].includes(focused) || (isRunning && this.answer.element.contains(focused));
    this.run.disabled = isRunning;
    this.stop.disabled = !isRunning;
    if (isLost) (isRunning ? this.stop : this.run).focus();
  }

  /** Adds an answer to the conversation; runs it again if it ends with the results of tools. */
  #continue({ messages, run }) {
    if (!this.#fields.conversation) this.choose(this.answer.body.model);
    const { conversation } = this.#fields;
    if (messages.some((message) => message.tool_calls)) conversation.keep(messages);
    else for (const { role, content } of messages) conversation.add(role, content);
    if (run) {
      this.form.requestSubmit();
    } else {
      conversation.add('user').focus();
      this.#showCode();
    }
  }
}

function groups(models) {
  const types = [...new Set(models.map(({ type }) => type))].sort((a, b) => (b === 'text') - (a === 'text'));
  return types.map((type) => h('optgroup', { label: words(type) },
    models.filter((model) => model.type === type).map(({ id, available }) =>
      h('option', { value: id }, available ? id : `${id} (no provider)`))));
}
