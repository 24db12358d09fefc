// The panel with the request as code. The key is $POMELO_API_KEY in all of them, never the key itself.

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

  /** Shows a request; `file` is its audio, or null. */
  show(type, body, file) {
    this.#request = { type, body, file };
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
    if (this.#request) this.#code.textContent = FORMS[this.#current](this.#request);
  }
}

/** Quotes a text for a shell. */
const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Returns the fields of a form as pairs of texts: objects as JSON. */
const formFields = (body) =>
  Object.entries(body).map(([name, value]) => [name, typeof value === 'object' ? JSON.stringify(value) : String(value)]);

function curl({ body, file }) {
  const start = `curl ${body.stream ? '-N ' : ''}${URL_OF_TASKS} \\\n  -H "Authorization: Bearer $POMELO_API_KEY"`;
  if (!file) return `${start} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quote(JSON.stringify(body, null, 2))}`;
  const fields = formFields(body).map(([name, value]) => ` \\\n  --form-string ${quote(`${name}=${value}`)}`);
  return `${start}${fields.join('')} \\\n  -F ${quote(`audio=@"${file.name.replace(/["\\]/g, '\\$&')}"`)}`;
}

function python({ type, body, file }) {
  const sent = file
    ? `    data=${pythonLiteral(Object.fromEntries(formFields(body)))},\n    files={"audio": open(${JSON.stringify(file.name)}, "rb")},`
    : `    json=${pythonLiteral(body)},`;
  const request = [
    'requests.post(',
    `    ${JSON.stringify(URL_OF_TASKS)},`,
    `    headers={"Authorization": f"Bearer {os.environ['POMELO_API_KEY']}"},`,
    sent,
    body.stream ? '    stream=True,\n)' : ')',
  ].join('\n');
  if (!body.stream) {
    return `import os\n\nimport requests\n\nresponse = ${request}\nresponse.raise_for_status()\n` +
      `result = response.json()\nprint(result${PYTHON_RESULTS[type] ?? ''})\n`;
  }
  return `import json\nimport os\n\nimport requests\n\nwith ${request} as response:\n` +
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

function javascript({ body, file }) {
  const headers = ["    Authorization: `Bearer ${process.env.POMELO_API_KEY}`,"];
  const start = [];
  if (file) {
    start.push("import { openAsBlob } from 'node:fs';", '', 'const form = new FormData();');
    start.push(...formFields(body).map(([name, value]) => `form.append(${JSON.stringify(name)}, ${JSON.stringify(value)});`));
    start.push(`form.append("audio", await openAsBlob(${JSON.stringify(file.name)}), ${JSON.stringify(file.name)});`, '');
  } else {
    headers.push("    'Content-Type': 'application/json',");
  }
  const sent = file ? 'form' : `JSON.stringify(${JSON.stringify(body, null, 2).replaceAll('\n', '\n  ')})`;
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
function grpc({ type, body, file }) {
  const { protocol, hostname } = location;
  const method = body.stream ? 'StreamTask' : 'RunTask';
  const plain = protocol === 'https:' ? '' : ' --http2-prior-knowledge';
  const start = `buf curl --protocol grpc${plain} \\\n  -H "authorization: Bearer $POMELO_API_KEY" \\\n  -d `;
  const end = `\\\n  ${protocol}//${hostname}:50051/pomelo.v1.TaskService/${method}`;
  const json = JSON.stringify(grpcRequest(type, body, file ? AUDIO : null), null, 2);
  if (!file) return `${start}${quote(json)} ${end}`;
  return `${start}@- ${end} <<JSON\n${escapeHere(json).replace(AUDIO, () => `$(base64 < ${quote(file.name)} | tr -d '\\n')`)}\nJSON`;
}

const AUDIO = 'AUDIO_AS_BASE64';

/** Escapes what a shell would expand in a here document. */
const escapeHere = (text) => text.replace(/[\\$`]/g, '\\$&');
