from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model="my-model", base_url="http://127.0.0.1:8000/v1", api_key="none")

print(model.invoke("Hello").text)
for chunk in model.stream("Hello"):
    print(chunk.text, end="", flush=True)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


asked = [HumanMessage("How is the weather in Paris?")]
asked.append(said := model.bind_tools([weather]).invoke(asked))
asked += [weather.invoke(call) for call in said.tool_calls]
print(model.invoke(asked).text)


class Person(BaseModel):
    name: str
    age: int


print(model.with_structured_output(Person).invoke("Ada is 36."))

# Of the page, only what is above.
from langchain_core.exceptions import ContextOverflowError, ModelInvalidRequestError, ModelNotFoundError

assert isinstance(asked[-1], ToolMessage)
assert model.invoke(asked).text == "Message 3, of the tool: sunny in Paris"
for method in ("json_schema", "function_calling"):
    assert model.with_structured_output(Person, method=method).invoke("Ada is 36.") == Person(name="Paris", age=36)
pieces = list(model.bind_tools([weather]).stream("How is the weather in Paris?"))
whole = pieces[0]
for piece in pieces[1:]:
    whole += piece
assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("weather", {"city": "Paris"})]

again = {"model": "my-model", "base_url": "http://127.0.0.1:8000/v1", "api_key": "none", "max_retries": 0}
responses = ChatOpenAI(**again, use_responses_api=True)
first = responses.invoke("Hello")
second = responses.invoke("And now?", previous_response_id=first.response_metadata["id"])
assert second.text == "Message 3, of the user: And now?"
for wrong, text, error in (
    ({"model": "none"}, "Hello", ModelNotFoundError),
    ({"temperature": -1}, "Hello", ModelInvalidRequestError),
    ({}, "x" * 20_000, ContextOverflowError),
):
    try:
        ChatOpenAI(**again | wrong).invoke(text)
    except error:
        continue
    raise AssertionError(error)
