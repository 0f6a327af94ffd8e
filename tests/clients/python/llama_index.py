from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

model = OpenAILike(
    model="my-model",
    api_base="http://127.0.0.1:8000/v1",
    api_key="none",
    # It takes a model for one without any of these, with 3900 tokens of context.
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=16384,
)

print(model.chat([ChatMessage("Hello")]))
for chunk in model.stream_chat([ChatMessage("Hello")]):
    print(chunk.delta, end="", flush=True)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


print(model.predict_and_call([FunctionTool.from_defaults(weather)], "How is the weather in Paris?"))


class Person(BaseModel):
    name: str
    age: int


print(model.as_structured_llm(Person).complete("Ada is 36.").raw)

# Of the page, only what is above.
import openai
from llama_index.llms.openai_like import OpenAILikeResponses

assert model.complete("Hello").text == "Message 1, of the user: Hello"
assert model.as_structured_llm(Person).complete("Ada is 36.").raw == Person(name="Paris", age=36)
tools = [FunctionTool.from_defaults(weather)]
said = model.chat_with_tools(tools, "How is the weather in Paris?")
(call,) = model.get_tool_calls_from_response(said)
assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Paris"})
history = [
    ChatMessage("How is the weather in Paris?"),
    said.message,
    ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id}),
]
assert model.chat(history).message.content == "Message 3, of the tool: sunny"

again = {"model": "my-model", "api_base": "http://127.0.0.1:8000/v1", "api_key": "none", "max_retries": 0}
assert OpenAILikeResponses(**again).complete("Hello").text == "Message 1, of the user: Hello"
try:
    OpenAILike(**again | {"model": "none"}, is_chat_model=True).complete("Hello")
except openai.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was answered")
