// The images of a message: chosen, dropped or pasted, and sent as data: URIs.

import { h } from './dom.js';
import { bytes } from './format.js';

/** What the images of a request may have: as base64 they fit a body of 8 MiB, with room for the text. */
const MAX_BYTES = 6_000_000;

const DETAILS = ['auto', 'low', 'high'];

/** The images of one message. `area` is where they can be dropped and pasted; `used` returns the bytes of all messages. */
export class Images {
  items = [];
  #list = h('ul', { class: 'attachments' });
  #note = h('p', { class: 'hint', role: 'status' }, 'Or drop or paste them.');

  constructor(area, used) {
    this.used = used;
    const input = h('input', { type: 'file', multiple: true, hidden: true, accept: 'image/png,image/jpeg,image/webp,image/gif',
      onchange: async () => { await this.#add(input.files); input.value = ''; } });
    this.#button = h('button', { type: 'button', class: 'quiet', onclick: () => input.click() }, 'Attach images');
    this.element = h('div', { class: 'images' }, this.#list, h('div', { class: 'row' }, this.#button, input, this.#note));
    area.addEventListener('paste', (event) => this.#take(event, event.clipboardData));
    area.addEventListener('drop', (event) => this.#take(event, event.dataTransfer));
    for (const name of ['dragover', 'dragleave', 'drop']) {
      area.addEventListener(name, (event) => {
        const isOver = name === 'dragover' && event.dataTransfer.types.includes('Files');
        if (isOver) event.preventDefault();
        area.classList.toggle('dropping', isOver && !this.element.hidden);
      });
    }
  }

  #button;

  /** Returns the images as parts of a message. */
  read() {
    return this.items.map(({ url, detail }) =>
      ({ type: 'image_url', image_url: { url, ...(detail.value === 'auto' ? {} : { detail: detail.value }) } }));
  }

  /**
   * Takes dropped or pasted files; a text is left to the browser. A message that can't have images ignores them: the
   * browser would leave the page to show a file.
   */
  #take(event, { files, types }) {
    if (!files.length || types.includes('text/plain')) return;
    event.preventDefault();
    if (!this.element.hidden) this.#add(files);
  }

  async #add(files) {
    const problems = [];
    for (const file of files) {
      const problem = await this.#addOne(file);
      if (problem) problems.push(problem);
    }
    this.#note.classList.toggle('bad', problems.length > 0);
    this.#note.textContent = problems.join(' ');
    this.#changed();
  }

  /** Adds a file; returns what is wrong with it, null if nothing is. */
  async #addOne(file) {
    const type = imageType(new Uint8Array(await file.slice(0, 12).arrayBuffer()));
    if (!type) return `${file.name} is not a PNG, JPEG, WebP or GIF image.`;
    if (this.used() + file.size > MAX_BYTES) {
      return `${file.name} has ${bytes(file.size)}: the images of a request may have ${bytes(MAX_BYTES)} together. Use a smaller one.`;
    }
    const url = `data:${type};base64,${await base64(file)}`;
    const detail = h('select', { 'aria-label': `Detail of ${file.name}` }, DETAILS.map((name) => h('option', { value: name }, `${name} detail`)));
    const item = { url, type, detail, name: file.name, size: file.size };
    const row = h('li', { class: 'attachment' },
      h('img', { src: url, alt: '' }),
      h('span', { class: 'file' }, file.name, ' ', h('small', {}, bytes(file.size))),
      detail,
      h('button', { type: 'button', class: 'quiet', 'aria-label': `Remove ${file.name}`, onclick: () => {
        this.items.splice(this.items.indexOf(item), 1);
        row.remove();
        this.#note.textContent = '';
        this.#button.focus();
        this.#changed();
      } }, 'Remove'));
    this.items.push(item);
    this.#list.append(row);
    return null;
  }

  #changed() {
    this.element.dispatchEvent(new Event('input', { bubbles: true }));
  }
}

/** Returns the media type that an image's first bytes have, as the server does; undefined for other files. */
function imageType(head) {
  const text = String.fromCharCode(...head);
  if (text.startsWith('\x89PNG\r\n\x1a\n')) return 'image/png';
  if (text.startsWith('\xff\xd8\xff')) return 'image/jpeg';
  if (/^GIF8[79]a/.test(text)) return 'image/gif';
  if (/^RIFF[^]{4}WEBP/.test(text)) return 'image/webp';
  return undefined;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(',') + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
