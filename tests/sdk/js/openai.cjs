// Uses OpenAI's JavaScript SDK, and prints what it got. Its argument is JSON: baseURL, key, badKey, parts
// (the functions below to call).
const OpenAI = require('openai');
const { zodResponseFormat, zodTextFormat } = require('openai/helpers/zod');
const { z } = require('zod');

const { baseURL, key, badKey, parts } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL, apiKey: key, maxRetries: 0 });
const model = 'gpt-4';
const messages = [{ role: 'user', content: 'Hello there' }];
const question = [{ role: 'user', content: 'How is the weather?' }];
const Forecast = z.object({ city: z.string(), sky: z.enum(['clear', 'cloudy']) });
const parameters = {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'], additionalProperties: false,
};

async function chat() {
  const whole = await client.chat.completions.create({ model, messages, seed: 1 });
  let text = '';
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ model, messages, seed: 1, ...options })) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  return { whole: whole.choices[0].message.content, text, same: usage.total_tokens === whole.usage.total_tokens };
}

async function tools() {
  const tool = { type: 'function', function: { name: 'weather', parameters, strict: true } };
  const options = { model, messages: [...question], tools: [tool] };
  const first = await client.chat.completions.create(options);
  const [call] = first.choices[0].message.tool_calls;
  const streamed = await client.chat.completions.stream(options).finalChatCompletion();
  options.messages.push(first.choices[0].message);
  options.messages.push({ role: 'tool', tool_call_id: call.id, content: 'Sunny' });
  const last = await client.chat.completions.create(options);
  return {
    name: call.function.name,
    arguments: Object.keys(JSON.parse(call.function.arguments)),
    same: streamed.choices[0].message.tool_calls[0].function.arguments === call.function.arguments,
    answer: last.choices[0].message.content,
  };
}

async function json() {
  const response_format = zodResponseFormat(Forecast, 'forecast');
  const answer = await client.chat.completions.parse({ model, messages: question, response_format });
  const text = { format: zodTextFormat(Forecast, 'forecast') };
  const response = await client.responses.parse({ model, input: 'How is the weather?', text });
  return [answer.choices[0].message.parsed, response.output_parsed].map((each) => Object.keys(each).sort());
}

async function responses() {
  const whole = await client.responses.create({ model, input: 'Hello there', store: false });
  const stream = client.responses.stream({ model, input: 'Hello there' });
  let text = '';
  stream.on('response.output_text.delta', (event) => { text += event.delta; });
  const last = await stream.finalResponse();
  return { whole: whole.output_text, text, last: last.output_text };
}

async function errors() {
  const failed = async (promise) => {
    try {
      await promise;
      return [];
    } catch (error) {
      return [error.constructor.name, error.status ?? null, error.code, error.param, Boolean(error.requestID)];
    }
  };
  const stranger = new OpenAI({ baseURL, apiKey: badKey, maxRetries: 0 });
  const cut = [{ role: 'user', content: '[[words:40]] [[cut]]' }];
  const broken = async () => {
    for await (const _ of await client.chat.completions.create({ model, messages: cut, stream: true }));
  };
  const ask = (more) => client.chat.completions.create({ model, messages, ...more });
  return {
    key: await failed(stranger.models.list()),
    field: await failed(ask({ temperature: 3 })),
    model: await failed(client.models.retrieve('gpt-99')),
    limit: await failed(ask({ messages: [{ role: 'user', content: '[[error:rate_limit_exceeded]]' }] })),
    provider: await failed(ask({ messages: [{ role: 'user', content: '[[error:provider_failed]]' }] })),
    stream: await failed(broken()),
  };
}

async function models() {
  const found = [];
  for await (const each of client.models.list()) found.push(each.id);
  return found;
}

async function main() {
  const results = {};
  for (const each of [chat, tools, json, responses, errors, models]) {
    if (parts.includes(each.name)) results[each.name] = await each();
  }
  console.log(JSON.stringify(results));
}

main();
