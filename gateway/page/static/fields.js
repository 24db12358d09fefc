// Form controls for the fields of a task, made from their JSON schemas in /openapi.json.

import { h, labelled } from './dom.js';
import { words } from './format.js';

const JSON_HINTS = {
  tools: 'A list of functions that the model may call, as JSON.',
  tool_choice: 'auto, none, required, or one of the tools as JSON.',
  response_format: 'The form of the output, as JSON.',
  metadata: 'Pairs of texts for the usage record, as JSON, such as {"team": "search"}.',
};

const EXAMPLES = {
  tools: [{
    type: 'function',
    function: {
      name: 'get_weather',
      description: 'Returns the weather of a city.',
      parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    },
  }],
  response_format: {
    type: 'json_schema',
    json_schema: {
      name: 'answer',
      strict: true,
      schema: {
        type: 'object',
        properties: { answer: { type: 'string' } },
        required: ['answer'],
        additionalProperties: false,
      },
    },
  },
};

/** A value that a control can't read; the message says which and why. */
export class InvalidField extends Error {}

/** Whether a field may have more than one value. */
export const isFree = ({ anyOf }) => !anyOf?.some((option) => 'const' in option || option.maxProperties === 0);

/** Follows a reference, and drops null as an alternative. */
function resolve(schema, schemas) {
  const options = (schema.anyOf ?? schema.oneOf ?? []).filter((option) => option.type !== 'null');
  const only = options.length === 1 ? { ...schema, ...options[0] } : schema;
  if (!only.$ref) return only;
  return { ...schemas[only.$ref.split('/').pop()], description: only.description };
}

const typesOf = (schema) => [schema.type ?? []].flat().filter((type) => type !== 'null');

/**
 * Returns the control of a field: its element, and `read`, which returns its value (undefined: it is left out, as
 * the default applies). `read` throws an InvalidField.
 */
export function field(name, declared, schemas, label = words(name)) {
  const schema = resolve(declared, schemas);
  const types = typesOf(schema);
  const choices = (schema.enum ?? []).filter((value) => value !== null);
  const hint = schema.description ?? '';
  if (choices.length) return choice(label, choices, schema.default, hint);
  if (types.length === 1 && types[0] === 'boolean') return choice(label, [true, false], schema.default, hint);
  if (types.length === 1 && types[0] === 'object' && isFlat(schema)) return group(label, schema, schemas);
  if (types.length === 1 && (types[0] === 'number' || types[0] === 'integer')) return numeric(label, schema, hint);
  if (types.length === 1 && types[0] === 'string') return text(label, schema, hint);
  if (types.includes('string') && schema.items?.type === 'string') return lines(label, `${hint} One a line.`);
  return json(name, label, JSON_HINTS[name] ?? `${hint} As JSON.`);
}

const isFlat = (schema) => {
  const properties = Object.values(schema.properties ?? {});
  return properties.length > 0 && properties.every((each) => typesOf(each).every((type) => /number|integer|boolean/.test(type)));
};

function choice(label, values, preset, hint) {
  const none = preset === undefined ? 'default' : `default (${preset})`;
  const select = h('select', {}, h('option', { value: '' }, none),
    values.map((value) => h('option', { value: JSON.stringify(value) }, String(value))));
  return { element: labelled(label, select, hint), read: () => (select.value ? JSON.parse(select.value) : undefined) };
}

function numeric(label, schema, hint) {
  const isWhole = typesOf(schema)[0] === 'integer';
  const input = h('input', {
    type: 'number', step: isWhole ? 1 : 'any', min: schema.minimum, max: schema.maximum,
    placeholder: schema.default ?? 'default',
  });
  return {
    element: labelled(label, input, [hint, range(schema)].filter(Boolean).join(' ')),
    read: () => {
      if (!input.checkValidity()) throw new InvalidField(`${label}: ${input.validationMessage}`);
      return input.value === '' ? undefined : input.valueAsNumber;
    },
  };
}

function range({ minimum, maximum }) {
  if (minimum === undefined || maximum === undefined || maximum > 1e6) return '';
  return `${minimum} to ${maximum}.`;
}

function text(label, schema, hint) {
  const isLong = schema.maxLength > 1000;  // without a maxlength of its own, which cuts a pasted text without a word
  const input = h(isLong ? 'textarea' : 'input', { rows: isLong ? 4 : false });
  return { element: labelled(label, input, hint, isLong ? 'wide' : ''), input, read: () => input.value || undefined };
}

function lines(label, hint) {
  const input = h('textarea', { rows: 2 });
  const read = () => {
    const values = input.value.split('\n').filter(Boolean);
    return values.length ? values : undefined;
  };
  return { element: labelled(label, input, hint), read };
}

function json(name, label, hint) {
  const input = h('textarea', { rows: 3, class: 'code', spellcheck: 'false' });
  const element = labelled(label, input, hint, 'wide');
  if (EXAMPLES[name]) {
    element.append(h('button', { type: 'button', class: 'quiet', onclick: () => {
      input.value = JSON.stringify(EXAMPLES[name], null, 2);
      input.rows = 8;
      input.dispatchEvent(new Event('input', { bubbles: true }));
      input.focus();
    } }, 'Insert an example'));
  }
  const read = () => {
    if (!input.value.trim()) return undefined;
    try { return JSON.parse(input.value); } catch {
      // One word, such as auto, stands for itself.
      if (/^\w+$/.test(input.value.trim())) return input.value.trim();
      throw new InvalidField(`${label}: this is not valid JSON.`);
    }
  };
  return { element, read };
}

function group(label, schema, schemas) {
  const parts = Object.entries(schema.properties).map(([name, each]) => [name, field(name, each, schemas)]);
  const element = h('fieldset', { class: 'wide' }, h('legend', {}, label),
    h('div', { class: 'grid' }, parts.map(([, part]) => part.element)));
  return { element, read: () => readAll(parts) };
}

/** Returns the values of fields that are not left out; undefined without any. `parts` are pairs of name and field. */
export function readAll(parts) {
  const values = parts.map(([name, part]) => [name, part.read()]).filter(([, value]) => value !== undefined);
  return values.length ? Object.fromEntries(values) : undefined;
}
