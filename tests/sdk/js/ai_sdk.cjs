// Uses the Vercel AI SDK with its provider for OpenAI-compatible APIs, and prints what it got. Its argument is JSON:
// baseURL, key, badKey, parts (the functions below to call).
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible');
const { APICallError, Output, generateText, stepCountIs, streamText, tool } = require('ai');
const { z } = require('zod');

const { baseURL, key, badKey, parts } = JSON.parse(process.argv[2]);
const options = { name: 'pomelo', baseURL, includeUsage: true, supportsStructuredOutputs: true };
const model = createOpenAICompatible({ ...options, apiKey: key })('gpt-4');
const maxRetries = 0;
const Forecast = z.object({ city: z.string(), sky: z.enum(['clear', 'cloudy']) });

async function chat() {
  const whole = await generateText({ model, prompt: 'Hello there', seed: 1, maxRetries });
  const stream = streamText({ model, prompt: 'Hello there', seed: 1, maxRetries });
  let text = '';
  for await (const piece of stream.textStream) text += piece;
  const usage = await stream.usage;
  return {
    whole: whole.text,
    text,
    finish: await stream.finishReason,
    same: usage.totalTokens === whole.usage.totalTokens && usage.totalTokens > 0,
  };
}

async function tools() {
  const called = [];
  const weather = tool({
    description: 'The weather in a city.',
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      called.push(typeof city);
      return 'Sunny';
    },
  });
  const asked = { model, prompt: 'How is the weather?', tools: { weather }, stopWhen: stepCountIs(3), maxRetries };
  const whole = await generateText(asked);
  const streamed = streamText(asked);
  return { called, whole: whole.text, text: await streamed.text, calls: called.length };
}

async function json() {
  const output = Output.object({ schema: Forecast });
  const answer = await generateText({ model, prompt: 'How is the weather?', output, maxRetries });
  return Object.keys(answer.output).sort();
}

async function image() {
  const pixel = Buffer.from(
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAACklEQVR4nGMAAQAABQABDQottAAAAABJRU5ErkJggg==', 'base64');
  const content = [{ type: 'text', text: 'What is it?' }, { type: 'image', image: pixel, mediaType: 'image/png' }];
  return (await generateText({ model, messages: [{ role: 'user', content }], maxRetries })).text;
}

async function errors() {
  const failed = async (asked) => {
    try {
      await generateText({ maxRetries, prompt: 'Hello there', model, ...asked });
      return [];
    } catch (error) {
      return [APICallError.isInstance(error), error.statusCode, error.isRetryable, error.message];
    }
  };
  const stranger = createOpenAICompatible({ ...options, apiKey: badKey })('gpt-4');
  return {
    key: await failed({ model: stranger }),
    field: await failed({ temperature: 3 }),
    limit: await failed({ prompt: '[[error:rate_limit_exceeded]]' }),
  };
}

async function main() {
  const results = {};
  for (const each of [chat, tools, json, image, errors]) {
    if (parts.includes(each.name)) results[each.name] = await each();
  }
  console.log(JSON.stringify(results));
}

main();
