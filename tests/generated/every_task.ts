// Sends a task of every type with the types that openapi-typescript has generated, and prints the models that were used.
import { strict as assert } from "node:assert";
import createClient from "openapi-fetch";
import type { components, paths } from "./pomelo.js";

type Schemas = components["schemas"];
const [url, key, image, audio] = JSON.parse(process.argv[2]) as string[];
const headers = { Authorization: `Bearer ${key}` };
const client = createClient<paths, "application/json">({ baseUrl: url, headers });

async function run(body: Schemas["Task"]): Promise<Schemas["TaskResult"]> {
  const { data, error } = await client.POST("/api/v1/task", { body });
  if (error) throw new Error(error.error.message);
  return data;
}

const question: Schemas["TextTask"] = {
  model: "gpt-4-turbo",
  max_tokens: 50,
  messages: [
    { role: "system", content: "Be brief." },
    {
      role: "user",
      content: [
        { type: "text", text: "What is in this image?" },
        { type: "image_url", image_url: { url: image } },
      ],
    },
  ],
};
const completion = await run(question);
assert(completion.object === "task.completion");
assert(completion.choices[0].message.content && completion.usage.completion_tokens);

const drawn = await run({ model: "flux-1-pro", prompt: "A kite", width: 64, height: 64 });
assert(drawn.object === "image.generation" && drawn.data[0].url);
assert.equal((await fetch(drawn.data[0].url)).headers.get("Content-Type"), "image/png");

const spoken = await run({ model: "eleven-labs-tts", text: "Hi", voice: "adam", voice_settings: { stability: 0.5 } });
assert(spoken.object === "speech.generation" && spoken.audio.b64_json);
const converted = await run({ model: "eleven-labs-sts", audio: spoken.audio.b64_json, voice: "adam" });
assert(converted.object === "speech.generation" && converted.audio.url);
const heard = await run({ model: "eleven-labs-stt", audio });
assert(heard.object === "speech.transcription" && heard.text);

const raw = await client.POST("/api/v1/task", {
  body: { model: "flux-1-pro", prompt: "A kite", width: 64, height: 64 },
  headers: { Accept: "image/*" },
  parseAs: "arrayBuffer",
});
assert.equal(raw.response.headers.get("Content-Type"), "image/png");

const file = await (await fetch(`data:audio/wav;base64,${audio}`)).blob();
const form = await client.POST("/api/v1/task", {
  body: { model: "eleven-labs-stt", timestamps: "none", audio },
  bodySerializer(body) {
    const fields = new FormData();
    for (const [name, value] of Object.entries(body)) {
      fields.append(name, name === "audio" ? file : String(value));
    }
    return fields;
  },
});
assert(form.data?.object === "speech.transcription" && form.data.words.length === 0);

const stream = await client.POST("/api/v1/task", { body: { ...question, stream: true }, parseAs: "text" });
const lines = (stream.data as unknown as string).split("\n\n").filter((line) => line.startsWith("data: {"));
const events = lines.map((line) => JSON.parse(line.slice(6)) as Schemas["TaskEvent"]);
let text = "";
for (const event of events) {
  if ("error" in event) throw new Error(event.error.message);
  if (event.object === "task.completion.chunk") text += event.choices[0].delta.content ?? "";
}
assert(text.length > 0);

const weather: Schemas["TextTask"] = {
  model: "gpt-4-turbo",
  messages: [{ role: "user", content: "How is the weather?" }],
  tools: [{ type: "function", function: { name: "get_weather", parameters: { type: "object" } } }],
  tool_choice: "required",
};
const asked = await run(weather);
assert(asked.object === "task.completion" && asked.choices[0].finish_reason === "tool_calls");
const calls = asked.choices[0].message.tool_calls ?? [];
assert.equal(calls[0].function.name, "get_weather");
weather.messages.push(
  { role: "assistant", tool_calls: calls },
  { role: "tool", tool_call_id: calls[0].id, content: "Sunny." },
);
const answer = await run(weather);
assert(answer.object === "task.completion" && answer.choices[0].message.content?.includes("Sunny."));

const answered = await run({
  model: "gpt-4-turbo",
  messages: [{ role: "user", content: "Name a city." }],
  response_format: {
    type: "json_schema",
    json_schema: { name: "city", schema: { type: "object", required: ["city"] } },
  },
});
assert(answered.object === "task.completion");
assert("city" in JSON.parse(answered.choices[0].message.content ?? ""));

const chat = await client.POST("/v1/chat/completions", {
  body: { model: "gpt-4-turbo", messages: [{ role: "user", content: "Hi" }], n: 1 },
});
assert(chat.data?.choices[0].message.content);
const response = await client.POST("/v1/responses", { body: { model: "gpt-4-turbo", input: "Hi" } });
assert(response.data?.output[0].type === "message" && response.data.output[0].content[0].text);
const event: Schemas["TextResponseEvent"] = { type: "error", sequence_number: 0, code: "", message: "", param: null, error: {} };
assert(event.type === "error");
const drawing = await client.POST("/v1/images/generations", { body: { model: "flux-1-pro", prompt: "A kite" } });
assert(drawing.data?.data[0].url);
const speech = await client.POST("/v1/audio/speech", {
  body: { model: "eleven-labs-tts", input: "Hi", voice: { id: "adam" }, speed: 1.1 },
  parseAs: "arrayBuffer",
});
assert(speech.response.headers.get("Content-Type")?.startsWith("audio/"));
const unknown = await client.GET("/v1/models/{id}", { params: { path: { id: "gpt-99" } } });
assert.equal(unknown.error?.error.param, "model");

const refused = await client.POST("/api/v1/task", { body: { model: "gpt-4", messages: [] } });
assert.equal(refused.error?.error.code, "missing_parameter");
// @ts-expect-error: the model decides which fields there are
const wrong: Schemas["Task"] = { model: "flux-1-pro", messages: [] };
assert(wrong);

const usage = await client.GET("/api/v1/usage", { params: { query: { page_size: 1000 } } });
assert(usage.data);
const models = usage.data.data.map((record) => (record.object === "usage.record" ? record.model : ""));
console.log(JSON.stringify(models));
