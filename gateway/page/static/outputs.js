// The output of each task type, shown while it arrives.

import { ownMedia } from './api.js';
import { h, labelled } from './dom.js';
import { bytes } from './format.js';

/** Returns the output of a task: `add` takes the objects of a stream, `finish` the last one, `stop` ends it. */
export function outputOf(type, body, audioUrl) {
  if (type === 'image') return new ImageOutput(body);
  if (type === 'speech-to-text') return new TranscriptOutput(audioUrl);
  if (type.endsWith('-to-speech')) return new SpeechOutput(body);
  return new TextOutput(body);
}

class TextOutput {
  #text = h('div', { class: 'text', tabindex: 0, role: 'region', 'aria-label': 'Text' });
  #calls = [];
  #more = h('div', { class: 'stack' });
  #reason = h('p', { class: 'hint' });

  constructor(body) {
    this.messages = body.messages;
    this.element = h('div', { class: 'stack' }, this.#text, this.#reason, this.#more);
  }

  add({ choices: [choice] }) {
    if (!choice) return;
    this.#text.append(choice.delta.content ?? '');
    for (const { index, id, function: part } of choice.delta.tool_calls ?? []) {
      const call = this.#calls[index] ??= { id, type: 'function', function: { name: '', arguments: '' } };
      call.function.name += part?.name ?? '';
      call.function.arguments += part?.arguments ?? '';
    }
    this.finishReason = choice.finish_reason;
  }

  finish({ choices: [choice] }) {
    if (choice.message) {
      this.#text.append(choice.message.content ?? '');
      this.#calls = choice.message.tool_calls ?? [];
    }
    this.#reason.textContent = `Finish reason: ${choice.finish_reason}`;
    this.#text.hidden = !this.#text.textContent && this.#calls.length > 0;
  }

  stop() {}

  /** Shows how the conversation can go on; `next` takes the messages to add. */
  offer(next) {
    const content = this.#text.textContent;
    if (!this.#calls.length) {
      this.#more.append(h('button', { type: 'button', class: 'quiet',
        onclick: () => next({ messages: [{ role: 'assistant', content }], run: false }) }, 'Continue the conversation'));
      return;
    }
    const results = this.#calls.map((call) => h('textarea', { rows: 2, class: 'code' }));
    this.#more.append(...this.#calls.map((call, i) => h('div', { class: 'call' },
      h('p', {}, h('strong', {}, call.function.name), ' ', h('code', {}, call.function.arguments)),
      labelled(`Result of ${call.function.name}`, results[i]))));
    this.#more.append(h('button', { type: 'button', onclick: () => next({
      messages: [
        { role: 'assistant', content: content || null, tool_calls: this.#calls },
        ...this.#calls.map((call, i) => ({ role: 'tool', tool_call_id: call.id, content: results[i].value })),
      ],
      run: true,
    }) }, 'Send the results'));
  }
}

class ImageOutput {
  #progress = h('progress', { max: 1, 'aria-label': 'Progress' });

  constructor(body) {
    this.prompt = body.prompt;
    this.type = `image/${body.output_format ?? 'png'}`;
    this.element = h('div', { class: 'stack' }, this.#progress);
  }

  add({ progress }) {
    if (progress !== undefined) this.#progress.value = progress;
  }

  finish({ data }) {
    this.element.replaceChildren(...data.map((file, i) => {
      const url = mediaUrl(file, this.type);
      const figure = h('figure', {}, h('img', { src: url, alt: this.prompt, onerror: () =>
        figure.replaceChildren(h('p', { class: 'bad', role: 'alert' }, 'The image can’t be loaded. Its link may have expired: run the task again.')) }),
        h('figcaption', {}, downloadLink(url, `image-${i + 1}`)));
      return figure;
    }));
  }

  stop() {
    this.#progress.remove();
  }
}

const AUDIO_TYPES = { mp3: 'audio/mpeg', opus: 'audio/ogg', wav: 'audio/wav' };

class SpeechOutput {
  #chunks = [];
  #note = h('p', { class: 'dim' });

  constructor(body) {
    this.type = AUDIO_TYPES[(body.output_format ?? 'mp3').split('_')[0]];
    this.element = h('div', { class: 'stack' }, this.#note);
  }

  add({ object, audio }) {
    if (!object.endsWith('.chunk')) return;
    this.#chunks.push(decode(audio.b64_json));
    this.#note.textContent = `${bytes(this.#chunks.reduce((sum, chunk) => sum + chunk.length, 0))} of audio received`;
  }

  finish({ audio }) {
    const isStream = this.#chunks.length > 0;
    const url = isStream ? URL.createObjectURL(new Blob(this.#chunks, { type: this.type })) : mediaUrl(audio, this.type);
    this.#show(url);
  }

  stop() {
    if (this.#chunks.length) this.#show(URL.createObjectURL(new Blob(this.#chunks, { type: this.type })));
  }

  #show(url) {
    const player = this.type
      ? h('audio', { controls: true, src: url, 'aria-label': 'The speech' })
      : h('p', {}, 'Browsers can’t play this format.');
    this.element.replaceChildren(player, this.#note, h('p', {}, downloadLink(url, 'speech')));
  }
}

const MAX_WORDS = 2000;

class TranscriptOutput {
  constructor(audioUrl) {
    this.audioUrl = audioUrl;
    this.element = h('div', { class: 'stack' });
  }

  add() {}

  finish({ text, language, words }) {
    const player = h('audio', { controls: true, src: this.audioUrl, 'aria-label': 'The transcribed audio' });
    const rows = words.slice(0, MAX_WORDS).map((word) => h('button', {
      type: 'button', class: 'word', title: `${word.start} s to ${word.end} s`,
      onclick: () => { player.currentTime = word.start; player.play().catch(() => {}); },
    }, h('span', {}, word.text), h('small', {}, `${word.start.toFixed(2)} s`),
      word.speaker ? h('small', {}, word.speaker.replace('_', ' ')) : null));
    this.element.replaceChildren(
      h('div', { class: 'text', role: 'region', 'aria-label': 'Text', tabindex: 0 }, text),
      h('p', { class: 'dim' }, `Language: ${language || 'unknown'}`),
      rows.length ? h('div', { class: 'stack' }, h('h3', {}, 'Words'), player, h('div', { class: 'words' }, rows)) : '');
  }

  stop() {}
}

const decode = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** Returns a URL of a media object, of its link if it has one. */
function mediaUrl(file, type) {
  return file.url ? ownMedia(file.url) : URL.createObjectURL(new Blob([decode(file.b64_json)], { type }));
}

const downloadLink = (url, name) => h('a', { href: url, download: name }, 'Download');
