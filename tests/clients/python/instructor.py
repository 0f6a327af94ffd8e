import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


client = instructor.from_openai(
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"),
    # The engine holds the model to the schema; the default asks it to call a tool instead.
    mode=instructor.Mode.JSON_SCHEMA,
)
asked = [{"role": "user", "content": "Ada is 36."}]
print(client.chat.completions.create(model="my-model", response_model=Person, messages=asked))

# Of the page, only what is above.
import openai
from instructor.core import InstructorRetryException

modes = (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.RESPONSES_TOOLS)
for mode in modes:
    client = instructor.from_openai(OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"), mode=mode)
    got = client.chat.completions.create(model="my-model", response_model=Person, messages=asked)
    assert (got.name, got.age) == ("Paris", 36), mode
client = instructor.from_openai(OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"))
*_, last = client.chat.completions.create_partial(model="my-model", response_model=Person, messages=asked)
assert (last.name, last.age) == ("Paris", 36)
try:
    client.chat.completions.create(model="none", response_model=Person, messages=asked, max_retries=1)
except (InstructorRetryException, openai.NotFoundError) as caught:
    assert "none" in str(caught)
else:
    raise AssertionError("an unknown model was answered")
