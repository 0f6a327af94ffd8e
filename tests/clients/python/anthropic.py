from anthropic import Anthropic

client = Anthropic(base_url="http://127.0.0.1:8000", api_key="none")
hello = [{"role": "user", "content": "Hello"}]

print(client.messages.create(model="my-model", max_tokens=200, messages=hello).content[0].text)
with client.messages.stream(model="my-model", max_tokens=200, messages=hello) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)

# Of the page, only what is above.
import anthropic

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather in a city.", "input_schema": SCHEMA}

assert stream.get_final_text() == "Message 1, of the user: Hello"
assert client.messages.count_tokens(model="my-model", messages=hello).input_tokens > 10
asked = [{"role": "user", "content": "The weather in Paris?"}]
said = client.messages.create(model="my-model", max_tokens=200, messages=asked, tools=[WEATHER])
(call,) = (part for part in said.content if part.type == "tool_use")
assert (said.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Paris"})
asked += [
    {"role": "assistant", "content": said.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
]
told = client.messages.create(model="my-model", max_tokens=200, messages=asked, tools=[WEATHER])
assert told.content[0].text == "Message 3, of the tool: sunny"
for wrong, error in (({"model": "none"}, anthropic.NotFoundError), ({"max_tokens": -1}, anthropic.BadRequestError)):
    try:
        client.messages.create(**{"model": "my-model", "max_tokens": 9, "messages": hello} | wrong)
    except error:
        continue
    raise AssertionError(wrong)
