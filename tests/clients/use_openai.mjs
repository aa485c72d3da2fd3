// npm's `openai`: chats, streams, tools that are run, forms, Responses, completions, embeddings.
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { CLIENTS_URL: baseURL, CLIENTS_EMBED_URL: embedURL, CLIENTS_MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const tried = (what) => console.log(`tried: ${what}`);
const messages = [{ role: "user", content: "Name a colour." }];
const common = { model, temperature: 0, max_tokens: 80 };
const parameters = {
  type: "object", additionalProperties: false, required: ["city"], properties: { city: { type: "string", maxLength: 20 } },
};

const whole = await client.chat.completions.create({ ...common, messages });
assert(whole.choices[0].message.content);
tried("chat");
let text = "";
for await (const chunk of await client.chat.completions.create({ ...common, messages, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);
tried("stream");
const streamed = client.chat.completions.stream({ ...common, messages });
assert.equal(await streamed.finalContent(), text);
tried("the helper for streams");
const runner = client.chat.completions.runTools({
  ...common, messages, tool_choice: { type: "function", function: { name: "get_weather" } },
  tools: [{ type: "function", function: {
    name: "get_weather", parameters, parse: JSON.parse, function: ({ city }) => `21 degrees in ${city}` } }],
});
assert(await runner.finalFunctionToolCallResult());
tried("runTools: a call that is run");
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(130), mood: z.enum(["good", "bad"]) });
const parsed = await client.chat.completions.parse({
  ...common, messages, response_format: zodResponseFormat(Person, "person"),
});
assert(Person.parse(parsed.choices[0].message.parsed));
tried("parse with zod");
const response = await client.responses.create({ model, input: "Name a colour.", max_output_tokens: 30 });
assert(response.output_text);
const next = await client.responses.create({
  model, input: "Another.", previous_response_id: response.id, max_output_tokens: 30,
});
assert(next.output_text);
tried("responses, and on from one");
let said = "";
for await (const event of await client.responses.create({ model, input: "Hello", stream: true, max_output_tokens: 30 })) {
  if (event.type === "response.output_text.delta") said += event.delta;
}
assert(said);
tried("responses, streamed");
assert((await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 8 })).choices[0].text);
tried("completions");
const aborted = new AbortController();
await assert.rejects(async () => {
  const options = { signal: aborted.signal };
  for await (const _ of await client.chat.completions.create({ ...common, messages, stream: true }, options)) {
    aborted.abort();
    throw new Error("aborted");
  }
});
tried("a stream that is given up");
await assert.rejects(client.chat.completions.create({ ...common, messages: [] }), OpenAI.BadRequestError);
tried("errors");
const embedder = new OpenAI({ baseURL: embedURL, apiKey: "none", maxRetries: 0 });
const made = await embedder.embeddings.create({ model, input: ["The cat sits on the mat.", "A kitten rests on a rug."] });
assert.equal(made.data[1].embedding.length, made.data[0].embedding.length);
tried("embeddings");
