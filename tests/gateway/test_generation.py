"""The generator over a gateway and a simulated engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hycluster.adapters import AdapterEntry
from hycluster.core import Generation, GenerationRequest, ModelCard, Priority, Sampling
from hycluster.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    PromptTooLong,
    ReplicaLost,
    RequestFailed,
    SettingsError,
    Unavailable,
    UnknownModel,
)
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedPool, SimulatedReplica, predicted
from tests.waiting import PATIENCE_S, eventually, until

if TYPE_CHECKING:
    from hycluster.gateway.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE: dict[str, Any] = {"vocab_size": 256, "max_model_len": 512}
FAST = Simulated(**ENGINE, realtime=False)
SLOW = Simulated(**ENGINE, step_base_s=0.02, decode_token_s=0.0)
# 400 tokens take longer than anybody waits.
ENDLESS = Simulated(**ENGINE, step_base_s=0.1, decode_token_s=0.0)
PROMPT = [10, 20, 30]

Open = Callable[..., contextlib.AbstractAsyncContextManager[tuple["Generator", SimulatedPool]]]


@pytest.fixture
def opened(tiny_model: Path) -> Open:
    @contextlib.asynccontextmanager
    async def begin(settings: Simulated = FAST, **changes: Any) -> AsyncIterator[tuple[Generator, SimulatedPool]]:
        from hycluster.gateway.generation import Generator
        from hycluster.gateway.opening import open_gateway

        model = Model(
            name="tiny",
            source=str(tiny_model),
            simulated=settings,
            engine={"max_model_len": 1024} | changes.pop("engine", {}),
            api=changes.pop("api", {}),
        )
        with SimulatedPool(settings, changes.pop("replicas", 1)) as simulated:
            async with open_gateway(
                model,
                simulated.directory(model),
                router=changes.pop("router", Router()),
                admission=changes.pop("admission", Admission()),
                wait_s=60,
            ) as gateway:
                yield Generator({"tiny": gateway}), simulated

    return begin


def ask(max_tokens: int | None = 8, **fields: Any) -> GenerationRequest:
    if not {"prompt", "messages", "token_ids"} & fields.keys():
        fields["token_ids"] = PROMPT
    sampling = {"max_tokens": max_tokens, "ignore_eos": True} | fields.pop("sampling", {})
    chosen: dict[str, Any] = {"model": "tiny", "sampling": Sampling(**sampling)} | fields
    return GenerationRequest(**chosen)


async def test_generate(opened: Open) -> None:
    async with opened() as (generator, _):
        answer = await generator.generate(ask(request_id="mine"))
    (output,) = answer.outputs
    assert output.token_ids == predicted(PROMPT, 8, FAST)
    assert output.text
    assert (output.index, output.finish_reason, output.logprobs) == (0, "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert (answer.request_id, answer.model) == ("mine", "tiny")


async def test_stream_adds_up_to_the_whole(opened: Open) -> None:
    async with opened(SLOW) as (generator, _):
        whole = await generator.generate(ask(sampling={"n": 2, "temperature": 1}))
        chunks = [chunk async for chunk in generator.stream(ask(sampling={"n": 2, "temperature": 1}))]
    for index in (0, 1):
        parts = [output for chunk in chunks for output in chunk.outputs if output.index == index]
        assert [token for part in parts for token in part.token_ids] == whole.outputs[index].token_ids
        assert "".join(part.text for part in parts) == whole.outputs[index].text
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert len(chunks) > 4
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16


async def test_text_and_chat_are_tokenized_by_the_model(opened: Open) -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with opened() as (generator, _):
        text = await generator.tokenize("tiny", prompt="hi")
        chat = await generator.tokenize("tiny", messages=messages)
        tokenizer: Any = generator.gateways["tiny"].renderer.tokenizer
        assert tokenizer.decode(text) == "hi"
        assert tokenizer.decode(chat) == "user: hi\nassistant:"
        for asked, ids in ((ask(prompt="hi"), text), (ask(messages=messages), chat)):
            answer = await generator.generate(asked)
            assert answer.outputs[0].token_ids == predicted(ids, 8, FAST)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("part", [None, 1, True, ["a"]])
async def test_whatever_rendering_trips_over_is_the_requests(opened: Open, part: object) -> None:
    content: Any = [part, {"type": "text", "text": "x"}]
    async with opened() as (generator, _):
        with pytest.raises(InvalidInput):
            await generator.generate(ask(messages=[{"role": "user", "content": content}]))


async def test_the_models_template_is_everybodys(opened: Open, tmp_path: Path) -> None:
    """Not HTTP's alone: else one model had another prompt for each way to ask it."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ mood }} {{ messages[0]['content'] }}!")
    api = {"chat_template": str(template), "default_chat_template_kwargs": {"mood": "oh"}}
    async with opened(api=api) as (generator, _):
        chat = await generator.tokenize("tiny", messages=[{"role": "user", "content": "hi"}])
        tokenizer: Any = generator.gateways["tiny"].renderer.tokenizer
        assert tokenizer.decode(chat) == "oh hi!"


async def test_a_template_that_is_not_there(opened: Open) -> None:
    with pytest.raises(SettingsError, match=r"^models: tiny: api\.chat_template: .*nowhere"):
        async with opened(api={"chat_template": "nowhere.jinja"}):
            pass


async def test_models(opened: Open) -> None:
    async with opened() as (generator, simulated):
        assert await generator.models() == [ModelCard("tiny", 512, 1)]
        assert await generator.ready()
        simulated[0].die()
        async with asyncio.timeout(PATIENCE_S):
            while await generator.ready():  # noqa: ASYNC110 - tests look from outside
                await asyncio.sleep(0.01)
        assert await generator.models() == [ModelCard("tiny", 512, 0)]
        with pytest.raises(Unavailable):
            await generator.generate(ask())


async def test_max_tokens_is_what_the_context_leaves(opened: Open) -> None:
    async with opened() as (generator, _):
        for asked in (None, 100_000):
            answer = await generator.generate(ask(max_tokens=asked))
            assert len(answer.outputs[0].token_ids) == 512 - len(PROMPT)


async def test_sampling_is_the_callers_then_the_models_then_vllms(opened: Open) -> None:
    from vllm.sampling_params import RequestOutputKind

    from hycluster.gateway.generation import sampling_params

    defaults = {"temperature": 0.3, "top_k": 7, "max_new_tokens": 5, "repetition_penalty": 1.25}
    async with opened(engine={"override_generation_config": defaults}) as (generator, _):
        gateway = generator.gateways["tiny"]
        params = sampling_params(gateway, Sampling(), 100, RequestOutputKind.DELTA)
        assert (params.temperature, params.top_k, params.max_tokens) == (0.3, 7, 5)
        assert (params.repetition_penalty, params.top_p, params.min_p) == (1.25, 1.0, 0.0)
        assert params.output_kind is RequestOutputKind.DELTA
        given = Sampling(temperature=0, top_k=-1, max_tokens=9, top_p=0.5, stop=("x",), stop_token_ids=(4,), seed=3)
        params = sampling_params(gateway, given, 100, RequestOutputKind.FINAL_ONLY)
        # Greedy: vLLM sets the others to all.
        assert (params.temperature, params.max_tokens, params.seed) == (0, 9, 3)
        assert (params.stop, params.stop_token_ids) == (["x"], [4])
        assert sampling_params(gateway, given, 2, RequestOutputKind.DELTA).max_tokens == 2


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"token_ids": [5] * 512}, PromptTooLong, "512"),
        ({"token_ids": [5] * 5000}, PromptTooLong, "512"),
        ({"prompt": "word " * 1000}, PromptTooLong, "512"),
        ({"prompt": "word " * 100_000}, PromptTooLong, "512"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, PromptTooLong, "512"),
        ({"token_ids": [10**6]}, InvalidInput, "1000000"),
        ({"token_ids": [-1]}, InvalidInput, "-1"),
        ({"messages": [{"role": "user", "content": "hi"}, {"content": "hi"}]}, InvalidInput, r"messages\[1\]\.role"),
        ({"model": "other"}, UnknownModel, "'other' is not served here; served are 'tiny'"),
        ({"sampling": {"logprobs": 10_000}}, InvalidInput, "logprobs"),
    ],
)
async def test_bad_input_is_named_and_costs_the_others_nothing(
    opened: Open, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    async with opened() as (generator, simulated):
        with pytest.raises(error, match=says):
            await generator.generate(ask(**fields))
        assert simulated[0].requests == 0
        assert (await generator.generate(ask())).outputs[0].token_ids == predicted(PROMPT, 8, FAST)


async def test_a_request_that_the_engine_fails(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise msgspec.ValidationError("not as it should be")

    monkeypatch.setattr("hycluster.engine.simulated.messages.decode_request", fail)
    async with opened() as (generator, _):
        with pytest.raises(RequestFailed, match=r"the engine ended this request early \(error\)"):
            await generator.generate(ask())


@pytest.mark.parametrize("n", [1, 3])
async def test_a_request_that_the_engine_knows_to_be_wrong(opened: Open, n: int) -> None:
    """Its end has a reason; all that is asked for with it is dropped, and nobody counts it as the engine's failure."""
    async with opened() as (generator, simulated):
        with pytest.raises(InvalidInput, match="a simulated engine has none"):
            await generator.generate(ask(sampling={"logprobs": 1, "n": n, "temperature": 1.0}))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 0)
        gateway, _ = generator._gateway("tiny")
        assert gateway.traffic.online.failed == {}
        await until(lambda: gateway.engine_core.requests_in_flight == 0)
        assert (await generator.generate(ask())).outputs[0].token_ids == predicted(PROMPT, 8, FAST)


async def test_of_several_sequences_some_are_refused_in_one_message(opened: Open) -> None:
    """As an engine does that has found two wrong before its gateway heard of the first: all of them are dropped."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    async with opened(ENDLESS) as (generator, simulated):
        asking = asyncio.create_task(generator.generate(ask(400, sampling={"n": 3, "temperature": 1.0})))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 3)
        client = generator._gateway("tiny")[0].engine_core
        (link,) = client._members.links.values()
        wrong = [
            EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason="wrong")
            for name in list(link.flights)[:2]
        ]
        link._book(EngineCoreOutputs(outputs=wrong))
        with pytest.raises(InvalidInput, match="wrong"):
            await asking
        await until(lambda: not client.requests_in_flight)
        # The engine that was made to say so still has the two.
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 2)
        assert client.outstanding == {"r0": 0}


async def test_a_request_that_finds_no_other_replica_is_told_so(opened: Open) -> None:
    async with opened(ENDLESS, router=Router(failover_wait_s=0.1)) as (generator, simulated):
        asking = asyncio.create_task(generator.generate(ask(max_tokens=400)))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 1)
        simulated[0].die()
        with pytest.raises(ReplicaLost, match="the replica that ran this request was lost"):
            await asking
        # There is none now, which is another matter.
        with pytest.raises(Unavailable) as caught:
            await generator.generate(ask())
        assert not isinstance(caught.value, ReplicaLost)


async def test_a_row_that_kills_engines_is_found_among_many(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.batch import ask as asking
    from hycluster.batch.refusal import RowRefused
    from hycluster.engine import messages
    from hycluster.engine.simulated import SimulatedEngine

    monkeypatch.setattr(asking, "FIRST_BACKOFF_S", 0.05)
    real = SimulatedEngine.add

    kills = 0

    def add(engine: SimulatedEngine, client: int, frames: Any) -> None:
        nonlocal kills
        real(engine, client, frames)
        if 99 in (messages.decode_request(frames).prompt_token_ids or ()):
            kills += engine.error is None
            engine.kill(RuntimeError("this prompt is too much"))

    monkeypatch.setattr(SimulatedEngine, "add", add)
    deaths = 0

    async def replace_the_dead(simulated: SimulatedPool) -> None:
        nonlocal deaths
        while True:
            for place, replica in enumerate(simulated.replicas):
                if replica.engine.error is not None:
                    deaths += 1
                    await asyncio.to_thread(replica.close)
                    simulated.replicas[place] = SimulatedReplica(SLOW, f"again{deaths}")
            await asyncio.sleep(0.02)

    async with opened(SLOW, replicas=2) as (generator, simulated):
        keeper = asyncio.create_task(replace_the_dead(simulated))
        ask_for = asking.Asker(retry_s=30)

        async def row(number: int) -> str:
            request = ask(token_ids=[10, number, 99 if number == 17 else 20])
            try:
                await ask_for(f"row{number}", lambda: generator.generate(request))
            except RowRefused as refused:
                return refused.reason
            return "answered"

        found = await asyncio.gather(*map(row, range(40)))
        keeper.cancel()
    assert found == ["Poison" if number == 17 else "answered" for number in range(40)]
    # One that dies before its answer to the call ahead has left does not count.
    assert 3 <= kills <= 5


async def test_batch_quarantines_what_the_model_refuses(opened: Open, tmp_path: Path) -> None:
    """Rows through the real front end: too long by characters, by tokens, by the room for an output, and refused."""
    from hycluster.batch.job import Job
    from hycluster.batch.refusal import refusal_of
    from hycluster.batch.task import open_task

    settings = {"name": "j", "model": "tiny", "task": "generate", "retry_s": 5, "output": {"path": str(tmp_path)}}
    settings |= {"input": {"path": "x", "columns": {"messages": "chat"}}, "sampling": {"max_tokens": 4}}
    async with opened() as (generator, _):

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[Any]:
            yield generator

        async with open_task(Job.model_validate(settings), connect) as task:

            async def reason(content: Any) -> str:
                try:
                    await task.answer({"chat": [{"role": "user", "content": content}]}, "r")
                except InvalidInput as error:
                    return refusal_of(error).error_type
                return "answered"

            assert await reason("hi") == "answered"
            assert await reason("x " * 100_000) == "PromptTooLong"
            assert await reason("x" * 600) == "PromptTooLong"
            assert await reason("x" * (512 - len("user: \nassistant:"))) == "PromptTooLong"
            assert await reason([{"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]) == "Refused"


async def until_deadline(stream: AsyncIterator[Generation]) -> list[Generation]:
    """What came before the deadline passed."""
    chunks: list[Generation] = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)  # noqa: PERF401 - kept although it raises

    with pytest.raises(DeadlineExceeded):
        await read()
    return chunks


async def test_deadline(opened: Open) -> None:
    async with opened(ENDLESS) as (generator, simulated):
        with pytest.raises(DeadlineExceeded):
            await generator.generate(ask(max_tokens=400), deadline_s=0.3)
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 0)
        assert len(await until_deadline(generator.stream(ask(max_tokens=400), deadline_s=2))) > 2
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 0)
        assert len((await generator.generate(ask(), deadline_s=PATIENCE_S)).outputs[0].token_ids) == 8


async def test_a_deadline_is_not_the_callers_fault(opened: Open) -> None:
    """What the caller does between two chunks is not cut off by its deadline."""
    async with opened(SLOW) as (generator, _):
        stream = generator.stream(ask(max_tokens=400), deadline_s=1)
        await anext(stream)
        await asyncio.sleep(1.1)
        await until_deadline(stream)


async def test_leaving_a_stream_aborts_it(opened: Open) -> None:
    async with opened(ENDLESS) as (generator, simulated):
        async with contextlib.aclosing(generator.stream(ask(max_tokens=400))) as stream:
            await anext(stream)
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 0)


async def test_batch_waits_for_online(opened: Open) -> None:
    settings = Simulated(**ENGINE, step_base_s=0.02, decode_token_s=0.0, max_num_seqs=1)
    async with opened(settings) as (generator, simulated):
        ended: list[str] = []

        async def run(name: str, priority: Priority) -> None:
            await generator.generate(ask(max_tokens=10, priority=priority, request_id=name))
            ended.append(name)

        first = asyncio.create_task(run("first", Priority.BATCH))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 1)
        batch = asyncio.create_task(run("batch", Priority.BATCH))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 2)
        await asyncio.gather(first, batch, run("online", Priority.ONLINE))
    assert ended.index("online") < ended.index("batch")


async def test_admission_counts_every_sequence(opened: Open) -> None:
    async with opened(SLOW, admission=Admission(max_requests=2)) as (generator, simulated):
        with pytest.raises(InvalidInput, match="at most 2"):
            await generator.generate(ask(sampling={"n": 3, "temperature": 1}))
        one = asyncio.create_task(generator.generate(ask(max_tokens=50)))
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 1)
        with pytest.raises(Overloaded, match="at most 2"):
            await generator.generate(ask(sampling={"n": 2, "temperature": 1}))
        await one
        await generator.generate(ask(sampling={"n": 2, "temperature": 1}))


async def test_the_tokens_of_a_jobs_rows_shut_out_nobody(opened: Open) -> None:
    async with opened(SLOW, admission=Admission(max_outstanding_tokens=300)) as (generator, simulated):
        rows = [
            asyncio.create_task(generator.generate(ask(200, priority=Priority.BATCH, job="mine"))) for _ in range(3)
        ]
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 3)
        online = [asyncio.create_task(generator.generate(ask(200))) for _ in range(2)]
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 5)
        # Those of others do, as before.
        with pytest.raises(Overloaded, match="tokens outstanding; at most 300 are admitted"):
            await generator.generate(ask(1))
        for each in (*rows, *online):
            each.cancel()
        await asyncio.gather(*rows, *online, return_exceptions=True)


async def test_rows_of_a_job_take_its_places_and_nobody_elses(opened: Open) -> None:
    async with opened(SLOW, admission=Admission(max_requests=2)) as (generator, simulated):
        gateway = generator.gateways["tiny"]
        bulk = [
            asyncio.create_task(generator.generate(ask(200, priority=Priority.BATCH, job="mine"))) for _ in range(3)
        ]
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 3)
        assert gateway.bulk.demands["mine"].rows == 3
        # They have bounds of their own: online requests find all of theirs.
        online = [asyncio.create_task(generator.generate(ask(20, job="mine"))) for _ in range(2)]
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 5)
        assert gateway.bulk.held == 3
        with pytest.raises(Overloaded, match="2 requests in flight"):
            await generator.generate(ask(1))
        await asyncio.gather(*online)
        for row in bulk:
            row.cancel()
        await asyncio.gather(*bulk, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: simulated[0].requests == 0)
        assert (gateway.bulk.held, gateway.bulk.demands) == (0, {})
        assert (gateway.traffic.online.refused, gateway.traffic.online.cancelled) == ({"overloaded": 1}, 0)
        assert (gateway.traffic.batch.refused, gateway.traffic.batch.cancelled) == ({}, 3)
        gateway.bulk.lane("other").take()
        gateway.bulk.lane("full").take()
        gateway.bulk._places = 0
        with pytest.raises(DeadlineExceeded):
            await generator.generate(ask(1, priority=Priority.BATCH, job="full"), deadline_s=0)
        with pytest.raises(InvalidInput, match=r"job: .* is too long"):
            await generator.generate(ask(1, priority=Priority.BATCH, job="j" * 513))


async def test_adapters_where_a_model_takes_none(opened: Open) -> None:
    async with opened() as (generator, _):
        for name, source, model, why in (
            ("x", "/x", None, r"^model: 'tiny' takes no adapters"),
            ("x", "/x", "tiny", r"^model: 'tiny' takes no adapters"),
            ("tiny", "/x", None, r"^lora_name: 'tiny' is the name of a model"),
            ("x", "", None, r"^lora_path: must not be empty"),
        ):
            with pytest.raises(InvalidInput, match=why):
                await generator.load_adapter(name, source, model=model)
        with pytest.raises(UnknownModel):
            await generator.load_adapter("x", "/x", model="nope")
        with pytest.raises(UnknownModel, match="'tiny' is not served here"):
            await generator.unload_adapter("tiny")
        assert [card.name for card in await generator.models()] == ["tiny"]


async def test_an_adapters_name_stands_for_its_model(opened: Open) -> None:
    async with opened() as (generator, _):
        generator.gateways["tiny"].adapters.take_over({"a": AdapterEntry(1, "x", "/a")})
        assert [generator.model_of(name) for name in ("tiny", "a", "b")] == ["tiny", "tiny", None]
        assert [card.name for card in await generator.models()] == ["tiny", "a"]
        assert await generator.tokenize("a", prompt="hi") == await generator.tokenize("tiny", prompt="hi")
        # The request carries the adapter, which vLLM's front end refuses where the settings make no room for it.
        with pytest.raises(InvalidInput, match="LoRA is not enabled"):
            await generator.generate(ask(model="a"))


async def test_tokens_are_counted_as_the_renderer_makes_them(opened: Open) -> None:
    async with opened() as (generator, _):
        count = generator.token_counter("tiny")
        texts = ["Hello", "", "长江", "two\nlines"]
        counted, again = await asyncio.gather(asyncio.to_thread(count, texts), asyncio.to_thread(count, texts))
        assert counted == again == [5, 0, 6, 9]
        assert count([]) == []
        assert await generator.count_tokens("tiny", texts) == counted
        with pytest.raises(UnknownModel, match="'other' is not served here"):
            await generator.count_tokens("other", texts)
        hello, nothing = [len(await generator.tokenize("tiny", prompt=text)) for text in ("Hello Hello", "Hello ")]
        assert hello - nothing == 5


async def test_a_text_longer_than_the_context_is_summarized(opened: Open) -> None:
    from hycluster.batch.ask import Asker
    from hycluster.batch.job import Summary
    from hycluster.batch.summaries.summarizer import Summarizer

    async with opened() as (generator, _):
        summarizer = Summarizer(
            generator,
            asyncio.Semaphore(8),
            Asker(retry_s=5),
            model="tiny",
            sampling=Sampling(max_tokens=32),
            settings=Summary(),
            whole=lambda text: [{"role": "user", "content": text}],
        )
        text = "A sentence of some words. " * 800
        assert not await summarizer.fits(text)
        tree = await summarizer.summarize(text, "doc")
        assert sum(node.end - node.start for node in tree.nodes if node.level == 0) == len(text)
        assert tree.root.level >= 1
        assert tree.root.completion_tokens == 32
        assert tree.prompt_tokens > len(text)
