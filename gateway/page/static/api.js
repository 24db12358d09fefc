// Calls of the REST API: JSON by fetch, forms with a file by XMLHttpRequest, which reports the upload's progress.

import { forgetLimits, observe } from './limits.js';
import { readEvents, eventParser } from './events.js';

let key = '';

/** Sets the key of all further calls. */
export function setKey(value) {
  if (value !== key) forgetLimits();
  key = value;
}

/** An error of the API: its code, message, HTTP status, and what the headers of the response say. */
export class ApiError extends Error {
  constructor(error, status = 0, headers = new Headers()) {
    super(error.message);
    this.code = error.code;
    this.status = status;
    this.requestId = headers.get('X-Request-Id');
    this.charged = headers.get('X-Credits-Charged');
    this.retryAfter = Number(headers.get('Retry-After')) || 0;
  }
}

const unreachable = () => new ApiError({ code: 'no_answer', message: 'The server did not answer.' });
const incomplete = () => new ApiError({ code: 'incomplete', message: 'The connection broke before the answer was complete.' });

function errorOf(body, status, headers) {
  return new ApiError(body?.error ?? { code: `http_${status}`, message: 'The response did not come from Pomelo.' }, status, headers);
}

/** Returns the JSON of a GET endpoint; throws an ApiError. `path` is relative to the page. */
export async function get(path, query = {}) {
  const parameters = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== ''));
  return readJson(await send(`${path}?${parameters}`, {}));
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error instanceof SyntaxError) throw errorOf(null, response.status, response.headers);
    throw error.name === 'AbortError' ? error : incomplete();
  }
}

/** Keeps what a response to a call with the key `sent` says of the limits, unless another key is set by now. */
function observeFor(sent, headers) {
  if (sent === key) observe(headers);
}

async function send(path, options) {
  const sent = key;
  const headers = { Authorization: `Bearer ${sent}`, ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === 'AbortError' ? error : unreachable();
  }
  observeFor(sent, response.headers);
  if (!response.ok) throw errorOf(await response.json().catch(() => null), response.status, response.headers);
  return response;
}

/**
 * Runs a task. `onEvent` gets the objects of a stream, `onUpload` the sent share of a file, 0 to 1. Returns the
 * response's headers and its object; for a stream, the last one. Throws an ApiError, or an AbortError.
 */
export function runTask(body, file, { signal, onHead, onEvent, onUpload }) {
  return file ? runForm(body, file, { signal, onHead, onEvent, onUpload }) : runJson(body, { signal, onHead, onEvent });
}

async function runJson(body, { signal, onHead, onEvent }) {
  const response = await send('api/v1/task', {
    method: 'POST', signal, body: JSON.stringify(body), headers: { 'Content-Type': 'application/json' },
  });
  onHead(response.headers);
  if (!body.stream) return { headers: response.headers, result: await readJson(response) };
  let last;
  try {
    for await (const event of readEvents(response.body)) last = handle(event, last, response.headers, onEvent);
  } catch (error) {
    throw error instanceof TypeError ? incomplete() : error;
  }
  if (!last?.done) throw incomplete();
  return { headers: response.headers, result: last.result };
}

/** Passes an event on; returns the last object so far, and whether the stream is complete. */
function handle({ event, data }, last, headers, onEvent) {
  if (data === '[DONE]') return { ...last, done: true };
  const object = parseOrNull(data);
  if (!object) throw incomplete();
  if (event === 'error') throw errorOf(object, 0, headers);
  onEvent(object);
  return { result: object, done: false };
}

/** Returns the form of a task: objects as JSON text, and the file as `audio`. */
function formOf(body, file) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    form.append(name, typeof value === 'object' ? JSON.stringify(value) : String(value));
  }
  form.append('audio', file, file.name);
  return form;
}

function runForm(body, file, { signal, onHead, onEvent, onUpload }) {
  return new Promise((resolve, reject) => {
    const sent = key;
    const request = new XMLHttpRequest();
    const headers = { get: (name) => request.getResponseHeader(name) };
    const parse = eventParser();
    let read = 0;
    let last;
    const isStream = () => request.status === 200 && body.stream;
    const readOn = () => {
      const text = request.responseText.slice(read);
      read += text.length;
      for (const event of parse(text)) last = handle(event, last, headers, onEvent);
    };
    const guarded = (action) => () => {
      try { action(); } catch (error) { reject(error); request.abort(); }
    };
    request.open('POST', 'api/v1/task');
    request.setRequestHeader('Authorization', `Bearer ${sent}`);
    request.upload.onprogress = (event) => onUpload(event.loaded / event.total);
    request.onreadystatechange = () => {
      if (request.readyState !== XMLHttpRequest.HEADERS_RECEIVED || !request.status) return;
      observeFor(sent, headers);
      if (request.status === 200) onHead(headers);
    };
    request.onprogress = guarded(() => { if (isStream()) readOn(); });
    request.onload = guarded(() => {
      if (isStream()) {
        readOn();
        if (!last?.done) throw incomplete();
        resolve({ headers, result: last.result });
      } else if (request.status === 200) {
        const result = parseOrNull(request.responseText);
        if (!result) throw errorOf(null, request.status, headers);
        resolve({ headers, result });
      } else {
        throw errorOf(parseOrNull(request.responseText), request.status, headers);
      }
    });
    request.onerror = () => reject(read ? incomplete() : unreachable());
    request.onabort = () => reject(new DOMException('Stopped', 'AbortError'));
    signal.addEventListener('abort', () => request.abort());
    request.send(formOf(body, file));
  });
}

function parseOrNull(text) {
  try { return JSON.parse(text); } catch { return null; }
}

/**
 * Returns the path of a media link on this page's own host: the policy of the page allows no other. The address before
 * the path may contain /media/, too.
 */
export const ownMedia = (url) => url.slice(url.lastIndexOf('/media/') + 1);
