// The checks of Vercel's AI SDK with its provider for OpenAI-compatible APIs.
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible');
const { Output, generateImage, generateText, stepCountIs, streamText, tool } = require('ai');
const { z } = require('zod');
const { hello, run, shared } = require('./runner.cjs');

const Forecast = z.object({ city: z.string(), sky: z.enum(['clear', 'cloudy']) });
const Place = z.object({ city: z.string(), unit: z.enum(['celsius', 'kelvin']) });

function open({ url, key }, options = {}) {
  return createOpenAICompatible({
    name: 'pomelo',
    baseURL: url,
    apiKey: options.key ?? key,
    includeUsage: true,
    supportsStructuredOutputs: true,
    fetch: options.fetch,
  });
}

const modelOf = (target, options) => open(target, options)('gpt-4');

async function ask(target, { prompt, temperature, retries = 0, ...options }) {
  const model = modelOf(target, options);
  return (await generateText({ model, prompt, temperature, maxRetries: retries })).text;
}

// Reads the whole stream: `textStream` leaves out errors.
async function read(target, { prompt, ...options }) {
  let text = '';
  const model = modelOf(target, options);
  const { fullStream } = streamText({ model, prompt, maxRetries: 0, onError: () => {} });
  for await (const part of fullStream) {
    if (part.type === 'error') throw part.error;
    if (part.type === 'text-delta') text += part.text;
  }
  return text;
}

// An error within a stream is a part of it, and no exception.
function describe(error) {
  const name = error instanceof Error ? error.constructor.name : 'error part';
  return [name, error.statusCode ?? null, error.data?.error.code ?? error.code ?? null];
}

const checks = {
  ...shared({ ask, read, describe }),

  async chat(target) {
    const answer = await generateText({ model: modelOf(target), prompt: hello, maxRetries: 0 });
    return { text: answer.text, tokens: answer.usage.totalTokens };
  },

  async tools(target) {
    const called = [];
    const execute = async (given) => {
      called.push(given);
      return 'Sunny';
    };
    const weather = tool({ description: 'The weather in a city.', inputSchema: Place, execute });
    const options = { model: modelOf(target), prompt: 'How is the weather?', tools: { weather }, maxRetries: 0 };
    const whole = await generateText({ ...options, stopWhen: stepCountIs(3) });
    await streamText({ ...options, stopWhen: stepCountIs(3) }).text;
    const [first, streamed] = called.map((given) => Object.keys(given).sort());
    return { name: whole.steps[0].toolCalls[0].toolName, arguments: first, streamed, answer: whole.text };
  },

  async schema(target) {
    const output = Output.object({ schema: Forecast });
    const options = { model: modelOf(target), prompt: 'How is the weather?', output, maxRetries: 0 };
    return Object.keys((await generateText(options)).output).sort();
  },

  async vision(target) {
    const image = { type: 'image', image: Buffer.from(target.pixel, 'base64'), mediaType: 'image/png' };
    const content = [{ type: 'text', text: `What does vercel on ${target.name} see?` }, image];
    const messages = [{ role: 'user', content }];
    return (await generateText({ model: modelOf(target), messages, maxRetries: 0 })).text;
  },

  async image(target) {
    const model = open(target).imageModel('flux-1-pro');
    const { image } = await generateImage({ model, prompt: 'A kite', size: '256x288', maxRetries: 0 });
    return Buffer.from(image.uint8Array).toString('hex', 0, 4);
  },
};

run(checks);
