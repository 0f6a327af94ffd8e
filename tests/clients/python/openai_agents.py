from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool

here = RunConfig(
    model_provider=OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none"),
    # They would go to OpenAI.
    tracing_disabled=True,
)


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


agent = Agent(name="Guide", instructions="Answer in one sentence.", model="my-model", tools=[weather])
print(Runner.run_sync(agent, "How is the weather in Paris?", run_config=here).final_output)

# Of the page, only what is above.
import asyncio

import openai
from agents import SQLiteSession
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


async def check(use_responses: bool) -> None:
    provider = OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none", use_responses=use_responses)
    here = RunConfig(model_provider=provider, tracing_disabled=True)
    session = SQLiteSession("one")
    ran = await Runner.run(agent, "The weather?", run_config=here, session=session)
    assert ran.final_output == "Message 4, of the tool: sunny in Paris", ran.final_output
    streamed = Runner.run_streamed(agent, "And now?", run_config=here, session=session)
    kinds = [event.type async for event in streamed.stream_events()]
    assert "raw_response_event" in kinds
    assert streamed.final_output == "Message 8, of the tool: sunny in Paris", streamed.final_output
    formed = Agent(name="Reader", model="my-model", output_type=Person)
    read = await Runner.run(formed, "Ada is 36.", run_config=here)
    assert read.final_output == Person(name="Paris", age=36)
    try:
        await Runner.run(Agent(name="Nobody", model="none"), "Hello", run_config=here)
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model was answered")


async def main() -> None:
    await check(True)
    await check(False)
    # The service keeps the conversation.
    plain = Agent(name="Guide", model="my-model")
    first = await Runner.run(plain, "Hello", run_config=here)
    second = await Runner.run(plain, "And now?", run_config=here, previous_response_id=first.last_response_id)
    assert second.final_output == "Message 3, of the user: And now?", second.final_output


asyncio.run(main())
