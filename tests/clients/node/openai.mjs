import OpenAI from "openai";

const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" });
const hello = [{ role: "user", content: "Hello" }];

const answer = await client.chat.completions.create({ model: "my-model", messages: hello });
console.log(answer.choices[0].message.content);
for await (const chunk of await client.chat.completions.create({ model: "my-model", messages: hello, stream: true }))
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");

// Of the page, only what is above.
import assert from "node:assert/strict";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "my-model";
const Person = z.object({ name: z.string(), age: z.int() });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", function: { name: "weather", parameters, function: ({ city }) => `sunny in ${city}`, parse: JSON.parse } };

assert.equal((await client.models.retrieve(model)).id, model);
const run = client.chat.completions.runTools({ model, messages: hello, tools: [weather] });
assert.equal(await run.finalContent(), "Message 3, of the tool: sunny in Paris");
const streamed = client.chat.completions.runTools({ model, messages: hello, tools: [weather], stream: true });
assert.equal(await streamed.finalContent(), "Message 3, of the tool: sunny in Paris");
const parsed = await client.chat.completions.parse({ model, messages: hello, response_format: zodResponseFormat(Person, "person") });
assert.deepEqual(parsed.choices[0].message.parsed, { name: "Paris", age: 36 });

const first = await client.responses.create({ model, input: "Hello" });
const second = await client.responses.create({ model, input: "And now?", previous_response_id: first.id });
assert.equal(second.output_text, "Message 3, of the user: And now?");
assert.equal((await client.responses.retrieve(first.id)).output_text, "Message 1, of the user: Hello");
const formed = await client.responses.parse({ model, input: "?", text: { format: zodTextFormat(Person, "person") } });
assert.deepEqual(formed.output_parsed, { name: "Paris", age: 36 });

const ask = (wrong) => client.chat.completions.create({ model, messages: hello, ...wrong });
await assert.rejects(ask({ model: "none" }), OpenAI.NotFoundError);
await assert.rejects(ask({ temperature: -1 }), OpenAI.BadRequestError);
const long = [{ role: "user", content: "x".repeat(20_000) }];
await assert.rejects(ask({ messages: long }), { name: "Error", code: "context_length_exceeded" });
