import litellm

service = {"model": "hosted_vllm/my-model", "api_base": "http://127.0.0.1:8000/v1", "api_key": "none"}
hello = [{"role": "user", "content": "Hello"}]

print(litellm.completion(**service, messages=hello).choices[0].message.content)
for chunk in litellm.completion(**service, messages=hello, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)

# Of the page, only what is above.
import json

from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}

for provider in ("hosted_vllm", "openai"):
    service["model"] = f"{provider}/my-model"
    asked = [{"role": "user", "content": "The weather in Paris?"}]
    said = litellm.completion(**service, messages=asked, tools=[WEATHER]).choices[0].message
    (call,) = said.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    asked += [said.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    told = litellm.completion(**service, messages=asked, tools=[WEATHER]).choices[0].message
    assert told.content == "Message 3, of the tool: sunny"
    formed = litellm.completion(**service, messages=hello, response_format=Person).choices[0].message
    assert Person.model_validate_json(formed.content) == Person(name="Paris", age=36)
    for wrong, error in (
        ({"model": f"{provider}/none"}, litellm.NotFoundError),
        ({"temperature": -1}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, litellm.ContextWindowExceededError),
    ):
        try:
            litellm.completion(**{**service, "messages": hello} | wrong)
        except error:
            continue
        raise AssertionError(error)

first = litellm.responses(**service, input="Hello")
assert first.output[0].content[0].text == "Message 1, of the user: Hello"
second = litellm.responses(**service, input="And now?", previous_response_id=first.id)
assert second.output[0].content[0].text == "Message 3, of the user: And now?"
