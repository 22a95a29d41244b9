// Streams of chat, of responses and of an assistant's run with the openai SDK for Node.
//
//   npm install openai
//   scripts/serve &
//   node docs/examples/clients/with_node.mjs

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

// Installed where the command is run.
const { OpenAI } = createRequire(join(process.cwd(), "package.json"))("openai");

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8080/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
  maxRetries: 0,
});
const model = (await client.models.list()).data[0].id;
const question = "What does `textwrap.dedent` do?";

async function chat() {
  const stream = client.chat.completions.stream({
    model,
    messages: [{ role: "user", content: question }],
    temperature: 0,
    max_tokens: 60,
    stream_options: { include_usage: true },
  });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, final.choices[0].message.content);
  assert.ok(final.usage.completion_tokens > 0);
  return text;
}

async function responses() {
  const stream = client.responses.stream({
    model,
    input: question,
    temperature: 0,
    max_output_tokens: 60,
  });
  let text = "";
  let number = -1;
  for await (const event of stream) {
    assert.equal(event.sequence_number, ++number);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  const final = await stream.finalResponse();
  assert.equal(text, final.output_text);
  assert.equal((await client.responses.retrieve(final.id)).output_text, text);
  await client.responses.delete(final.id);
  return text;
}

async function assistants() {
  const { assistants, threads } = client.beta;
  const assistant = await assistants.create({ model, temperature: 0 });
  const thread = await threads.create({ messages: [{ role: "user", content: question }] });
  const stream = threads.runs.stream(thread.id, {
    assistant_id: assistant.id,
    max_completion_tokens: 60,
  });
  let text = "";
  stream.on("textDelta", (delta) => (text += delta.value ?? ""));
  const [message] = await stream.finalMessages();
  assert.equal(text, message.content[0].text.value);
  assert.ok(["completed", "incomplete"].includes(stream.currentRun().status));
  const listed = await threads.messages.list(thread.id);
  assert.equal(listed.data[0].id, message.id);
  await assistants.delete(assistant.id);
  return text;
}

const answers = [];
for (const ask of [chat, responses, assistants]) {
  answers.push(await ask());
  console.log(`${ask.name}: ${answers.at(-1)}`);
}
// The same question, greedily: whichever way it is asked.
assert.equal(answers[0], answers[1]);
assert.equal(answers[0], answers[2]);
