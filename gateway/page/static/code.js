// The panel with the request as code. The key is $POMELO_KEY in all of them, never the key itself.

import { copyButton, h, newId } from './dom.js';
import { grpcRequest } from './grpc.js';

const FORMS = { curl, Python: python, JavaScript: javascript, gRPC: grpc };
const URL_OF_TASKS = new URL('api/v1/task', document.baseURI).href;

/** Tabs with the same request in each form. */
export class CodePanel {
  #current = 'curl';
  #request = null;
  #code = h('code', {});
  #tabs;

  constructor() {
    const panelId = newId('code');
    this.#tabs = Object.keys(FORMS).map((name) => h('button', {
      type: 'button', role: 'tab', id: newId('tab'), 'aria-controls': panelId, onclick: () => this.#select(name),
    }, name));
    const list = h('div', { role: 'tablist', 'aria-label': 'Forms of the request', onkeydown: (event) => this.#move(event) }, this.#tabs);
    this.panel = h('pre', { role: 'tabpanel', id: panelId, class: 'code', tabindex: 0 }, this.#code);
    this.element = h('section', { class: 'card stack', 'aria-label': 'Code' },
      h('div', { class: 'row' }, h('h2', {}, 'Code'), list, h('span', { class: 'end' }, copyButton(() => this.#code.textContent))),
      this.panel);
    this.#select('curl');
  }

  /** Shows a request. `file` is its audio, or null; `images` are those of its messages, with their data: URIs. */
  show(type, body, file, images) {
    const marks = new Map(images.map(({ url }, i) => [url, mark(i)]));
    const marked = JSON.parse(JSON.stringify(body, (_, value) => marks.get(value) ?? value));
    this.#request = { type, body: marked, file, images };
    this.#write();
  }

  #select(name) {
    this.#current = name;
    for (const tab of this.#tabs) {
      const isSelected = tab.textContent === name;
      tab.setAttribute('aria-selected', isSelected);
      tab.tabIndex = isSelected ? 0 : -1;
      if (isSelected) this.panel.setAttribute('aria-labelledby', tab.id);
    }
    this.#write();
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = this.#tabs.findIndex((tab) => tab.tabIndex === 0);
    const next = this.#tabs[(at + step + this.#tabs.length) % this.#tabs.length];
    this.#select(next.textContent);
    next.focus();
  }

  #write() {
    if (this.#request) this.#code.textContent = this.#written();
  }

  #written() {
    try {
      return FORMS[this.#current](this.#request);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      // A field has another form than the API documents. The request can be sent: the API says what is wrong.
      return `This request has no ${this.#current} form: a field does not have the form that the API documents.`;
    }
  }
}

/** Stands for a file's content in a request: the code reads the file. A character for private use begins it. */
const mark = (number) => `\uE000${number}`;

/** Replaces the marks of JSON text by what `write` returns for each of the files. */
const readFiles = (json, files, write) =>
  json.replace(/"\uE000(\d+)"/g, (text, number) => (files[number] ? write(files[number]) : text));

const dataUri = ({ type }) => `data:${type};base64,`;

/** Quotes a text for a shell. */
const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Returns a here document of a shell with JSON, in which `write` returns the text for each file. */
const hereDocument = (json, files, write) =>
  `<<JSON\n${readFiles(json.replace(/[\\$`]/g, '\\$&'), files, (file) => `"${write(file)}"`)}\nJSON`;

/** Returns the expression of a shell for a file's content. */
const shellBase64 = ({ name }) => `$(base64 < ${quote(name)} | tr -d '\\n')`;

/** Returns the fields of a form as pairs of texts: objects as JSON. */
const formFields = (body) =>
  Object.entries(body).map(([name, value]) => [name, typeof value === 'object' ? JSON.stringify(value) : String(value)]);

function curl({ body, file, images }) {
  const start = `curl ${body.stream ? '-N ' : ''}${URL_OF_TASKS} \\\n  -H "Authorization: Bearer $POMELO_KEY"`;
  if (!file) {
    const json = JSON.stringify(body, null, 2);
    const data = images.length
      ? `@- ${hereDocument(json, images, (image) => dataUri(image) + shellBase64(image))}`
      : quote(json);
    return `${start} \\\n  -H 'Content-Type: application/json' \\\n  -d ${data}`;
  }
  const fields = formFields(body).map(([name, value]) => ` \\\n  --form-string ${quote(`${name}=${value}`)}`);
  return `${start}${fields.join('')} \\\n  -F ${quote(`audio=@"${file.name.replace(/["\\]/g, '\\$&')}"`)}`;
}

function python({ type, body, file, images }) {
  const expression = (image) => `"${dataUri(image)}" + b64encode(Path(${JSON.stringify(image.name)}).read_bytes()).decode()`;
  const imports = images.length ? 'from base64 import b64encode\nfrom pathlib import Path\n' : '';
  const sent = file
    ? `    data=${pythonLiteral(Object.fromEntries(formFields(body)))},\n    files={"audio": open(${JSON.stringify(file.name)}, "rb")},`
    : `    json=${readFiles(pythonLiteral(body), images, expression)},`;
  const request = [
    'requests.post(',
    `    ${JSON.stringify(URL_OF_TASKS)},`,
    `    headers={"Authorization": f"Bearer {os.environ['POMELO_KEY']}"},`,
    sent,
    body.stream ? '    stream=True,\n)' : ')',
  ].join('\n');
  if (!body.stream) {
    return `import os\n${imports}\nimport requests\n\nresponse = ${request}\nresponse.raise_for_status()\n` +
      `result = response.json()\nprint(result${PYTHON_RESULTS[type] ?? ''})\n`;
  }
  return `import json\nimport os\n${imports}\nimport requests\n\nwith ${request} as response:\n` +
    '    response.raise_for_status()\n    for line in response.iter_lines():\n' +
    '        if line.startswith(b"data: ") and line != b"data: [DONE]":\n            print(json.loads(line[6:]))\n';
}

const PYTHON_RESULTS = {
  text: '["choices"][0]["message"]',
  image: '["data"][0]["url"]',
  'text-to-speech': '["audio"]["url"]',
  'speech-to-speech': '["audio"]["url"]',
  'speech-to-text': '["text"]',
};

function pythonLiteral(value) {
  // Only the names differ from JSON; those within strings are left alone.
  return JSON.stringify(value, null, 4)
    .replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, text, name) => text ?? { true: 'True', false: 'False', null: 'None' }[name])
    .replaceAll('\n', '\n    ');
}

function javascript({ body, file, images }) {
  const expression = (image) => `\`${dataUri(image)}\${readFileSync(${JSON.stringify(image.name)}, 'base64')}\``;
  const headers = ["    Authorization: `Bearer ${process.env.POMELO_KEY}`,"];
  const start = [];
  if (file) {
    start.push("import { openAsBlob } from 'node:fs';", '', 'const form = new FormData();');
    start.push(...formFields(body).map(([name, value]) => `form.append(${JSON.stringify(name)}, ${JSON.stringify(value)});`));
    start.push(`form.append("audio", await openAsBlob(${JSON.stringify(file.name)}), ${JSON.stringify(file.name)});`, '');
  } else {
    headers.push("    'Content-Type': 'application/json',");
    if (images.length) start.push("import { readFileSync } from 'node:fs';", '');
  }
  const json = JSON.stringify(body, null, 2).replaceAll('\n', '\n  ');
  const sent = file ? 'form' : `JSON.stringify(${readFiles(json, images, expression)})`;
  return [
    ...start,
    `const response = await fetch(${JSON.stringify(URL_OF_TASKS)}, {`,
    "  method: 'POST',",
    '  headers: {',
    ...headers,
    '  },',
    `  body: ${sent},`,
    '});',
    'if (!response.ok) throw new Error(await response.text());',
    ...(body.stream ? JAVASCRIPT_STREAM : ['console.log(await response.json());']),
    '',
  ].join('\n');
}

const JAVASCRIPT_STREAM = [
  "let rest = '';",
  'for await (const text of response.body.pipeThrough(new TextDecoderStream())) {',
  "  const events = (rest + text).split('\\n\\n');",
  '  rest = events.pop();',
  '  for (const event of events) {',
  "    const data = event.match(/^data: (.*)$/m)?.[1];",
  "    if (data && data !== '[DONE]') console.log(JSON.parse(data));",
  '  }',
  '}',
];

/** The gRPC server is assumed on the page's host and the default port: the page can't know its address. */
function grpc({ type, body, file, images }) {
  const { protocol, hostname } = location;
  const method = body.stream ? 'StreamTask' : 'RunTask';
  const plain = protocol === 'https:' ? '' : ' --http2-prior-knowledge';
  const start = `buf curl --protocol grpc${plain} \\\n  -H "authorization: Bearer $POMELO_KEY" \\\n  -d `;
  const end = `\\\n  ${protocol}//${hostname}:50051/pomelo.v1.TaskService/${method}`;
  const json = JSON.stringify(grpcRequest(type, body, file ? mark(0) : null), null, 2);
  const files = file ? [file] : images;
  return files.length ? `${start}@- ${end} ${hereDocument(json, files, shellBase64)}` : `${start}${quote(json)} ${end}`;
}
