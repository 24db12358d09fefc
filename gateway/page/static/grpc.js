// A task of the REST API as the JSON form of a gRPC request. Fields have the same names unless listed here.

const DELIVERY = { url: 'MEDIA_DELIVERY_LINK', b64_json: 'MEDIA_DELIVERY_INLINE' };
const SPEC_FIELDS = ['user', 'metadata'];

/** Returns a RunTaskRequest or StreamTaskRequest; `audio` is the audio as base64, or null. Images have base64 as URL. */
export function grpcRequest(type, body, audio) {
  const { model, stream, response_format: format, ...fields } = body;
  const spec = { model };
  const input = {};
  for (const [name, value] of Object.entries(fields)) {
    if (SPEC_FIELDS.includes(name)) spec[name] = value;
    else input[name] = CONVERSIONS[`${type}.${name}`]?.(value) ?? CONVERSIONS[name]?.(value) ?? value;
  }
  if (audio) input.audio = { data: audio };
  if (type === 'text' && format) Object.assign(input, textFormat(format));
  spec[type.replaceAll('-', '_')] = input;
  const delivery = typeof format === 'string' ? DELIVERY[format] : undefined;
  return { spec, ...(delivery ? { options: { delivery } } : {}) };
}

const CONVERSIONS = {
  messages: (messages) => messages.map(message),
  stop: (value) => [value].flat(),
  tools: (tools) => tools.map(({ function: { name, description, parameters, strict } }) => ({
    name, description, parameters_json: parameters && JSON.stringify(parameters), strict,
  })),
  tool_choice: (value) => (typeof value === 'string' ? { mode: `MODE_${value.toUpperCase()}` } : { tool: value.function.name }),
  reasoning_effort: (value) => `REASONING_EFFORT_${value.toUpperCase()}`,
  timestamps: (value) => `TIMESTAMP_GRANULARITY_${value.toUpperCase()}`,
  'image.output_format': (value) => `IMAGE_FORMAT_${value.toUpperCase()}`,
};

/** Converts a message of the page, whose content is a text, a list of parts or null. */
function message({ role, content, tool_calls: calls = [], tool_call_id: id }) {
  const texts = Array.isArray(content) ? content.map(part) : content === null ? [] : [{ text: content }];
  const made = calls.map((call) => ({
    tool_call: { id: call.id, name: call.function.name, arguments_json: call.function.arguments },
  }));
  return {
    role: `ROLE_${role.toUpperCase()}`,
    content: role === 'tool' ? [{ tool_result: { tool_call_id: id, content } }] : [...texts, ...made],
  };
}

function part({ text, image_url: image }) {
  if (!image) return { text };
  return { image: { source: { data: image.url }, detail: image.detail && `IMAGE_DETAIL_${image.detail.toUpperCase()}` } };
}

function textFormat({ type, json_schema: declared }) {
  if (type === 'json_object') return { format: { json_object: {} } };
  if (type !== 'json_schema') return {};
  const { name, description, schema, strict } = declared;
  return { format: { json_schema: { name, description, schema_json: JSON.stringify(schema), strict } } };
}
