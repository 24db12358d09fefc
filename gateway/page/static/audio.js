// The audio of a task: a file, or a recording by the microphone.

import { h, labelled, newId } from './dom.js';
import { InvalidField } from './fields.js';
import { bytes } from './format.js';

/** Chooses or records audio. `file` is what was chosen last, `url` plays it. */
export class AudioInput {
  file = null;
  url = '';
  #recorder = null;
  #isAsking = false;
  #player = h('audio', { controls: true, hidden: true, 'aria-label': 'The chosen audio' });
  #note = h('p', { class: 'hint', role: 'status' });

  constructor() {
    const input = h('input', { type: 'file', accept: 'audio/*,video/webm,text/plain', id: newId('audio'),
      onchange: () => { if (input.files[0]) this.#choose(input.files[0]); } });
    this.#button = h('button', { type: 'button', onclick: () => this.#toggle() }, 'Record');
    const field = labelled('audio', input);
    field.classList.add('wide');
    field.append(h('div', { class: 'row' }, this.#button, this.#note), this.#player);
    this.element = field;
  }

  #button;

  read() {
    if (!this.file) throw new InvalidField('audio: choose a file, or record one.');
    return this.file;
  }

  #choose(file) {
    this.file = file;
    URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(file);
    this.#player.src = this.url;
    this.#player.hidden = false;
    this.#note.textContent = `${file.name}, ${bytes(file.size)}`;
    this.element.dispatchEvent(new Event('input', { bubbles: true }));
  }

  /** Ends a recording; what was recorded is kept. */
  stop() {
    if (this.#recorder?.state === 'recording') this.#recorder.stop();
  }

  async #toggle() {
    if (this.#recorder) {
      this.stop();
      return;
    }
    if (this.#isAsking) return;
    this.#isAsking = true;
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch {
      this.#note.textContent = 'The microphone can’t be used. Allow it in the browser, or choose a file.';
      return;
    } finally {
      this.#isAsking = false;
    }
    const parts = [];
    const recorder = this.#recorder = new MediaRecorder(stream);
    recorder.ondataavailable = ({ data }) => {
      parts.push(data);
      if (!this.element.isConnected) this.stop();  // another view was opened: nobody sees that it records
      this.#note.textContent = `Recording: ${bytes(parts.reduce((sum, part) => sum + part.size, 0))}`;
    };
    recorder.onstop = () => {
      stream.getTracks().forEach((track) => track.stop());
      this.#recorder = null;
      this.#button.textContent = 'Record';
      const type = parts[0].type.split(';')[0]; // Firefox leaves recorder.mimeType empty
      this.#choose(new File(parts, `recording.${type.split('/')[1]}`, { type }));
    };
    recorder.start(250);
    this.#button.textContent = 'Stop recording';
    this.#note.textContent = 'Recording';
  }
}
