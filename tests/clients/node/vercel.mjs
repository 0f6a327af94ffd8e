import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const hycluster = createOpenAICompatible({
  name: "hycluster",
  baseURL: "http://127.0.0.1:8000/v1",
  // Without it, a schema is only put into the prompt.
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = hycluster("my-model");

console.log((await generateText({ model, prompt: "Hello" })).text);
for await (const text of streamText({ model, prompt: "Hello" }).textStream) process.stdout.write(text);

const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});
const asked = { model, prompt: "How is the weather in Paris?", tools: { weather }, stopWhen: stepCountIs(3) };
console.log((await generateText(asked)).text);

const Person = z.object({ name: z.string(), age: z.int() });
console.log((await generateText({ model, prompt: "Ada is 36.", output: Output.object({ schema: Person }) })).output);

// Of the page, only what is above.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError } from "ai";

const told = await generateText(asked);
assert.equal(told.steps.length, 2);
assert.equal(told.text, 'Message 3, of the tool: sunny in Paris');
assert.equal(await streamText(asked).text, told.text);
assert.ok((await streamText({ model, prompt: "Hello" }).usage).inputTokens > 10);
const formed = { model, prompt: "Ada is 36.", output: Output.object({ schema: Person }) };
assert.deepEqual((await generateText(formed)).output, { name: "Paris", age: 36 });

async function refused(more) {
  const error = await generateText({ model, prompt: "Hello", maxRetries: 0, ...more }).then(assert.fail, (error) => error);
  assert.ok(APICallError.isInstance(error), error);
  return [error.statusCode, error.isRetryable, error.message];
}
const [status, retryable, message] = await refused({ model: hycluster("none") });
assert.deepEqual([status, retryable], [404, false]);
assert.match(message, /`none`/);
assert.deepEqual((await refused({ temperature: -1 })).slice(0, 2), [400, false]);

// OpenAI's own provider, which asks /v1/responses unless it is told otherwise.
const openai = createOpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" });
const whole = { providerOptions: { openai: { store: false } } };
for (const [each, more] of [[openai("my-model"), whole], [openai.chat("my-model"), {}]]) {
  assert.equal((await generateText({ ...asked, ...more, model: each })).text, told.text);
  assert.deepEqual((await generateText({ ...formed, ...more, model: each })).output, { name: "Paris", age: 36 });
}
const { response } = await generateText({ model: openai("my-model"), prompt: "Hello" });
const further = { model: openai("my-model"), messages: [...response.messages, { role: "user", content: "And now?" }] };
assert.equal((await generateText({ ...further, ...whole })).text, "Message 2, of the user: And now?");
await assert.rejects(generateText(further), /'item_reference' is not allowed/);
