// Vercel's `ai` with its OpenAI provider (Responses and chat) and the OpenAI-compatible one.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { z } from "zod";

const { CLIENTS_URL: baseURL, CLIENTS_EMBED_URL: embedURL, CLIENTS_MODEL: name } = process.env;
const tried = (what) => console.log(`tried: ${what}`);
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "here", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const models = {
  "openai(), Responses": openai(name), "openai.chat()": openai.chat(name), "openai-compatible": compatible(name),
};
const schema = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(130), mood: z.enum(["good", "bad"]) });
const weather = ai.tool({
  description: "The weather now.", inputSchema: z.object({ city: z.string().max(20) }),
  execute: async ({ city }) => `21 degrees in ${city}`,
});
for (const [label, model] of Object.entries(models)) {
  const common = { model, temperature: 0, maxOutputTokens: 80, maxRetries: 0 };
  const whole = await ai.generateText({ ...common, prompt: "Name a colour." });
  assert(whole.text);
  assert(whole.usage.outputTokens > 0);
  tried(`${label}: generateText`);
  const stream = ai.streamText({ ...common, prompt: "Name a colour.", onError: () => {} });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  tried(`${label}: streamText`);
  const formed = await ai.generateText({ ...common, prompt: "Who are you?", output: ai.Output.object({ schema }) });
  assert(schema.parse(formed.output));
  tried(`${label}: Output.object`);
  // Two steps: the call is forced and run, and what came of it goes back in the history.
  const steps = await ai.generateText({
    ...common, prompt: "The weather in Paris?", tools: { weather },
    stopWhen: ai.stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "weather" } : "none" }),
  });
  assert.equal(steps.steps[0].toolResults[0].toolName, "weather");
  assert.equal(steps.steps.length, 2);
  tried(`${label}: a tool that is run, and its result goes back`);
}
const again = [{ role: "user", content: "Name a colour." }];
const first = await ai.generateText({ model: models["openai(), Responses"], messages: again, maxRetries: 0, maxOutputTokens: 30 });
again.push(...first.response.messages, { role: "user", content: "Another." });
assert((await ai.generateText({ model: models["openai(), Responses"], messages: again, maxRetries: 0, maxOutputTokens: 30 })).text);
tried("Responses: history by reference");
const embedder = createOpenAI({ baseURL: embedURL, apiKey: "none" });
const { embeddings } = await ai.embedMany({
  model: embedder.embeddingModel(name), values: ["The cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell."],
});
assert(ai.cosineSimilarity(embeddings[0], embeddings[1]) > ai.cosineSimilarity(embeddings[0], embeddings[2]));
tried("embedMany");
