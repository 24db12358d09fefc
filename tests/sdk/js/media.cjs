// Makes images, speech and transcripts in all forms with OpenAI's SDK for JavaScript. Returns what the SDK returned.
const { toFile } = require('openai');

const image = { model: 'flux-1-pro', prompt: 'A kite', size: '256x288' };
const model = 'eleven-labs-stt';

async function events(stream) {
  const found = [];
  for await (const event of stream) found.push(event);
  return found;
}

async function failure(call) {
  try {
    await call;
    return null;
  } catch (error) {
    const { code, param, status } = error;
    return { name: error.constructor.name, code, param, status, hasId: Boolean(error.requestID) };
  }
}

// `target` has the text to speak.
module.exports = async (client, target) => {
  const speech = { model: 'eleven-labs-tts', voice: 'alloy', input: target.text };
  const bytes = async (options) => {
    const response = await client.audio.speech.create({ ...speech, ...options });
    return Buffer.from(await response.arrayBuffer());
  };
  const { data } = await client.images.generate(image);
  const download = await fetch(data[0].url);
  const linked = Buffer.from(await download.arrayBuffer());
  const streamed = await events(await client.images.generate({ ...image, stream: true }));

  const audio = await bytes({});
  const transcribe = async (options) =>
    client.audio.transcriptions.create({ model, file: await toFile(audio, 'speech.mp3'), ...options });
  const transcripts = {};
  for (const format of ['json', 'text', 'verbose_json', 'diarized_json', 'srt', 'vtt']) {
    transcripts[format] = await transcribe({ response_format: format });
  }
  const granularities = ['word', 'segment'];
  const times = await transcribe({ response_format: 'verbose_json', timestamp_granularities: granularities });

  return {
    sameImage: linked.equals(Buffer.from(data[0].b64_json, 'base64')),
    streamed: streamed.map((event) => [event.type, event.output_format, event.size]),
    audio: audio.subarray(0, 3).toString('latin1'),
    wav: (await bytes({ response_format: 'wav' })).subarray(0, 4).toString('latin1'),
    transcripts,
    words: times.words.map((each) => each.word).join(' '),
    segments: times.segments.map((each) => each.text),
    events: await events(await transcribe({ stream: true })),
    failures: [
      await failure(client.images.generate({ ...image, size: '1x1' })),
      await failure(client.audio.speech.create({ ...speech, input: '' })),
      await failure(client.audio.transcriptions.create({ model: 'gpt-4', file: await toFile(audio, 'a.mp3') })),
      await failure(client.withOptions({ apiKey: 'pml_test_wrong' }).images.generate(image)),
      await failure(client.audio.speech.create({ ...speech, model: 'nobody' })),
      await failure(client.models.retrieve('gpt-99')),
    ],
  };
};
