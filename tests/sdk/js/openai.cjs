// The checks of OpenAI's SDK for JavaScript.
const OpenAI = require('openai');
const { zodResponseFormat, zodTextFormat } = require('openai/helpers/zod');
const { z } = require('zod');
const media = require('./media.cjs');
const { hello, run, shared } = require('./runner.cjs');

const model = 'gpt-4';
const question = [{ role: 'user', content: 'How is the weather?' }];
const Forecast = z.object({ city: z.string(), sky: z.enum(['clear', 'cloudy']) });
const parameters = {
  type: 'object',
  properties: { city: { type: 'string' }, unit: { type: 'string', enum: ['celsius', 'kelvin'] } },
  required: ['city', 'unit'],
  additionalProperties: false,
};

function open({ url, key }, options = {}) {
  return new OpenAI({ baseURL: url, apiKey: options.key ?? key, maxRetries: options.retries ?? 0, fetch: options.fetch });
}

async function ask(target, { prompt, temperature, ...options }) {
  const messages = [{ role: 'user', content: prompt }];
  const answer = await open(target, options).chat.completions.create({ model, messages, temperature });
  return answer.choices[0].message.content;
}

async function read(target, { prompt, ...options }) {
  const messages = [{ role: 'user', content: prompt }];
  let text = '';
  const stream = await open(target, options).chat.completions.create({ model, messages, stream: true });
  for await (const chunk of stream) text += chunk.choices[0].delta.content ?? '';
  return text;
}

function describe(error) {
  return [error.constructor.name, error.status ?? null, error.code ?? null];
}

const checks = {
  ...shared({ ask, read, describe }),

  async chat(target) {
    const messages = [{ role: 'user', content: hello }];
    const answer = await open(target).chat.completions.create({ model, messages });
    return { text: answer.choices[0].message.content, tokens: answer.usage.total_tokens };
  },

  async responses(target) {
    const client = open(target);
    const whole = await client.responses.create({ model, input: hello, store: false });
    const stream = client.responses.stream({ model, input: hello });
    let text = '';
    stream.on('response.output_text.delta', (event) => { text += event.delta; });
    await stream.finalResponse();
    return { whole: whole.output_text, text };
  },

  async tools(target) {
    const { completions } = open(target).chat;
    const tool = { type: 'function', function: { name: 'weather', parameters, strict: true } };
    const options = { model, messages: [...question], tools: [tool] };
    const { message } = (await completions.create(options)).choices[0];
    const [call] = message.tool_calls;
    const streamed = await completions.stream(options).finalChatCompletion();
    options.messages.push(message, { role: 'tool', tool_call_id: call.id, content: 'Sunny' });
    const last = await completions.create(options);
    const names = ({ function: { arguments: text } }) => Object.keys(JSON.parse(text)).sort();
    return {
      name: call.function.name,
      arguments: names(call),
      streamed: names(streamed.choices[0].message.tool_calls[0]),
      answer: last.choices[0].message.content,
    };
  },

  async schema(target) {
    const response_format = zodResponseFormat(Forecast, 'forecast');
    const answer = await open(target).chat.completions.parse({ model, messages: question, response_format });
    const text = { format: zodTextFormat(Forecast, 'forecast') };
    const response = await open(target).responses.parse({ model, input: question[0].content, text });
    const names = Object.keys(answer.choices[0].message.parsed).sort();
    if (names.join() !== Object.keys(response.output_parsed).sort().join()) throw new Error('The two differ');
    return names;
  },

  async vision(target) {
    const image = { type: 'image_url', image_url: { url: `data:image/png;base64,${target.pixel}` } };
    const content = [{ type: 'text', text: `What does node on ${target.name} see?` }, image];
    const answer = await open(target).chat.completions.create({ model, messages: [{ role: 'user', content }] });
    return answer.choices[0].message.content;
  },

  async image(target) {
    const options = { model: 'flux-1-pro', prompt: 'A kite', size: '256x288' };
    const { data } = await open(target).images.generate(options);
    return Buffer.from(data[0].b64_json, 'base64').toString('hex', 0, 4);
  },

  async speech(target) {
    const options = { model: 'eleven-labs-tts', voice: 'alloy', input: target.text };
    const response = await open(target).audio.speech.create(options);
    return Buffer.from(await response.arrayBuffer()).toString('hex', 0, 2);
  },

  async transcription(target) {
    const file = await OpenAI.toFile(Buffer.from(target.audio, 'base64'), 'speech.mp3');
    return (await open(target).audio.transcriptions.create({ model: 'eleven-labs-stt', file })).text;
  },

  async models(target) {
    const found = [];
    for await (const each of open(target).models.list()) found.push(each.id);
    return found;
  },

  media: (target) => media(open(target), target),
};

run(checks);
