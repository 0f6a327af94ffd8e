from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
hello = [{"role": "user", "content": "Hello"}]

print(client.chat.completions.create(model="my-model", messages=hello).choices[0].message.content)
with client.chat.completions.stream(model="my-model", messages=hello) as stream:
    for event in stream:
        if event.type == "content.delta":
            print(event.delta, end="", flush=True)

# Kept by the service: whichever ingress process is asked next knows what was said.
first = client.responses.create(model="my-model", input="Hello")
second = client.responses.create(model="my-model", input="And now?", previous_response_id=first.id)
print(second.output_text)

# Of the page, only what is above.
import json

import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}

assert second.output_text == "Message 3, of the user: And now?"
assert client.responses.retrieve(first.id).output_text == "Message 1, of the user: Hello"
assert client.models.retrieve("my-model").id == "my-model"
assert [model.id for model in client.models.list()] == ["my-model"]

asked = [{"role": "user", "content": "The weather in Paris?"}]
said = client.chat.completions.create(model="my-model", messages=asked, tools=[WEATHER]).choices[0]
(call,) = said.message.tool_calls
assert (said.finish_reason, call.function.name) == ("tool_calls", "weather")
assert json.loads(call.function.arguments) == {"city": "Paris"}
asked += [said.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
told = client.chat.completions.create(model="my-model", messages=asked, tools=[WEATHER]).choices[0]
assert told.message.content == "Message 3, of the tool: sunny"

parsed = client.chat.completions.parse(model="my-model", messages=hello, response_format=Person)
assert parsed.choices[0].message.parsed == Person(name="Paris", age=36)
assert client.responses.parse(model="my-model", input="?", text_format=Person).output_parsed.age == 36

tool = {"type": "function", "strict": True, "name": "weather", "parameters": SCHEMA}
called = client.responses.create(model="my-model", input="?", tools=[tool])
(call,) = (item for item in called.output if item.type == "function_call")
output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
told = client.responses.create(model="my-model", input=[output], previous_response_id=called.id)
assert told.output_text == "Message 3, of the tool: sunny"

for wrong, error, code in (
    ({"model": "none"}, openai.NotFoundError, 404),
    ({"temperature": -1}, openai.BadRequestError, 400),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, openai.BadRequestError, "context_length_exceeded"),
):
    try:
        client.chat.completions.create(**{"model": "my-model", "messages": hello} | wrong)
    except error as caught:
        assert str(caught.code) == str(code), caught
    else:
        raise AssertionError(wrong)
