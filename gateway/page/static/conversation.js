// The editor of a text task's messages.

import { h, labelled, newId } from './dom.js';
import { Images } from './images.js';

const ROLES = ['user', 'assistant'];

/** The messages of a text task: a system prompt and turns; messages with tool calls are kept as they are. */
export class Conversation {
  #more = h('button', { type: 'button', class: 'quiet', onclick: () => this.add('user').focus() }, 'Add a message');

  constructor() {
    this.system = h('textarea', { rows: 2, placeholder: 'How the model should answer (optional)' });
    this.turns = h('div', { class: 'turns' });
    this.element = h('div', { class: 'wide' },
      labelled('System prompt', this.system),
      this.turns,
      h('div', { class: 'row' }, this.#more));
    this.add('user').value = 'Explain quantum computing in one paragraph.';
  }

  /** Adds a turn; returns its text control. */
  add(role, content = '') {
    const text = h('textarea', { rows: 3, id: newId('message'), value: content });
    const select = h('select', { 'aria-label': 'Role', oninput: () => showImages() },
      ROLES.map((name) => h('option', { selected: name === role }, name)));
    const turn = h('div', { class: 'turn' },
      h('div', { class: 'row' }, h('label', { for: text.id }, 'Message'), select, this.#removeButton(() => turn)),
      text);
    const images = new Images(turn, () => this.images.reduce((sum, { size }) => sum + size, 0));
    const showImages = () => { images.element.hidden = select.value !== 'user'; };  // only users send them
    showImages();
    turn.append(images.element);
    turn.images = () => (images.element.hidden ? [] : images.items);
    turn.read = () => {
      const parts = images.element.hidden ? [] : images.read();
      if (!parts.length) return text.value ? [{ role: select.value, content: text.value }] : [];
      return [{ role: select.value, content: [...(text.value ? [{ type: 'text', text: text.value }] : []), ...parts] }];
    };
    this.turns.append(turn);
    return text;
  }

  /** Adds messages that can't be edited: an assistant's tool calls, and their results. */
  keep(messages) {
    const turn = h('div', { class: 'turn' },
      h('div', { class: 'row' }, h('strong', {}, messages[0].tool_calls ? 'Tool calls and results' : 'Messages'),
        this.#removeButton(() => turn)),
      h('pre', { class: 'code', tabindex: 0 }, JSON.stringify(messages, null, 2)));
    turn.read = () => messages;
    turn.images = () => [];
    this.turns.append(turn);
  }

  #removeButton(turn) {
    return h('button', { type: 'button', class: 'quiet end', onclick: () => {
      turn().remove();
      this.#more.focus();
      this.element.dispatchEvent(new Event('input', { bubbles: true }));
    } }, 'Remove');
  }

  /** The images of all messages: each with its data: URI, media type, name and size. */
  get images() {
    return [...this.turns.children].flatMap((turn) => turn.images());
  }

  read() {
    const system = this.system.value.trim();
    const turns = [...this.turns.children].flatMap((turn) => turn.read());
    return [...(system ? [{ role: 'system', content: system }] : []), ...turns];
  }
}
