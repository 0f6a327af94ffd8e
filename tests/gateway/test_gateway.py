"""The gateway over simulated engines: what vLLM's front end makes of their tokens."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import GatewayWork
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import InvalidInput, KillsReplicas, Overloaded, Unavailable
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.settings.simulated import Simulated
from tests.gateway.test_served_policies import TellingEngine
from tests.simulated_pool import SimulatedPool, predicted
from tests.waiting import eventually, until

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from hycluster.gateway.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

# The tiny model's 258 tokens: every one has a text.
ENGINE: dict[str, Any] = {"vocab_size": 256, "max_model_len": 512}
FAST = Simulated(**ENGINE, realtime=False)
SLOW = Simulated(**ENGINE, step_base_s=0.01, decode_token_s=0.0)
# 400 tokens take longer than anybody waits.
ENDLESS = Simulated(**ENGINE, step_base_s=0.1, decode_token_s=0.0)
PROMPT = [10, 20, 30]


class Served:
    """A gateway and the replicas behind it."""

    def __init__(self, gateway: Gateway, replicas: SimulatedPool) -> None:
        self.gateway = gateway
        self.replicas = replicas

    async def generate(
        self, request_id: str = "r", priority: int = 0, tokens: list[int] = PROMPT, **sampling: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Every output of one request; end of sequence is ignored, as ``predicted`` does."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(**({"max_tokens": 20, "ignore_eos": True, "temperature": 0} | sampling))
        (prompt,) = await self.gateway.renderer.render_cmpl_async([{"prompt_token_ids": tokens}])
        async with contextlib.aclosing(self.gateway.generate(prompt, params, request_id, priority=priority)) as outputs:
            async for output in outputs:
                yield output

    async def last(self, request_id: str = "r", **sampling: Any) -> RequestOutput:
        return [output async for output in self.generate(request_id, **sampling)][-1]

    async def running(self, *counts: int) -> None:
        """Wait until the replicas have this many sequences each."""
        await asyncio.to_thread(eventually, lambda: tuple(r.requests for r in self.replicas.replicas) == counts)


Open = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def opened(tiny_model: Path) -> Open:
    @contextlib.asynccontextmanager
    async def begin(
        settings: Simulated,
        replicas: int = 1,
        admission: Admission | None = None,
        router: Router | None = None,
        kind: type[SimulatedEngine] = SimulatedEngine,
    ) -> AsyncIterator[Served]:
        from hycluster.gateway.opening import open_gateway

        model = Model(
            name="tiny",
            source=str(tiny_model),
            simulated=settings,
            engine={"max_model_len": 1024},
            replicas=Replicas(min=replicas),
        )
        with SimulatedPool(settings, replicas, kind) as simulated:
            async with open_gateway(
                model,
                simulated.directory(model),
                router=router or Router(),
                admission=admission or Admission(),
                wait_s=60,
            ) as gateway:
                await until(lambda: gateway.engine_core.links == replicas)
                yield Served(gateway, simulated)

    return begin


async def test_tokens_and_text(opened: Open) -> None:
    async with opened(FAST) as served:
        output = await served.last()
        (only,) = output.outputs
        assert list(only.token_ids) == predicted(PROMPT, 20, FAST)
        tokenizer: Any = served.gateway.renderer.tokenizer
        # Bytes that may yet become a character are held back.
        assert only.text == tokenizer.decode(predicted(PROMPT, 20, FAST)).rstrip("\ufffd")
        assert only.finish_reason == "length"
        assert output.prompt_token_ids == PROMPT
        assert served.gateway.engine_core.outstanding == {"r0": 0}


async def test_a_policy_that_needs_them_has_kv_blocks_followed_and_work_told(opened: Open) -> None:
    async with opened(ENDLESS, 2, router=Router(policy="predicted_ttft"), kind=TellingEngine) as served:
        pool = served.gateway.engine_core
        prefixes = pool.prefixes
        assert prefixes is not None
        tasks = [asyncio.create_task(served.last("0", tokens=[7] * 100, max_tokens=400))]
        await until(lambda: prefixes.blocks == 100 // ENDLESS.block_size_tokens)
        home = next(replica for replica, tokens in pool.outstanding.items() if tokens)
        tasks.append(asyncio.create_task(served.last("1", tokens=[7] * 100, max_tokens=400)))
        await until(lambda: pool.requests_in_flight == 2)
        assert pool.work is not None
        assert pool.work[home].requests == 2
        await until(
            lambda: any(
                report.address.replica_id == home and report.load.work.get(pool.gateway_id, GatewayWork()).requests == 2
                for report in served.gateway._view.replicas  # type: ignore[union-attr]
            )
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not pool.work[home].requests)  # type: ignore[index]
    async with opened(FAST, router=Router(policy="power_of_two"), kind=TellingEngine) as served:
        assert served.gateway.engine_core.prefixes is None
        assert served.gateway.engine_core.work is None


async def test_the_engines_context_is_the_gateways(opened: Open) -> None:
    async with opened(FAST) as served:
        assert served.gateway.model_config.max_model_len == 512
        assert served.gateway.vllm_config.cache_config.num_gpu_blocks == FAST.kv_blocks


async def test_two_replicas_say_what_one_says(opened: Open) -> None:
    async with opened(FAST, 2) as served:
        answers = await asyncio.gather(*(served.last(str(number)) for number in range(16)))
    assert {tuple(answer.outputs[0].token_ids) for answer in answers} == {tuple(predicted(PROMPT, 20, FAST))}


async def test_stop_string(opened: Open) -> None:
    async with opened(FAST) as served:
        whole = (await served.last(max_tokens=200)).outputs[0].text
    stop = next(character for character in whole[5:] if character.isascii() and character.isprintable())
    async with opened(ENDLESS) as served:
        stopped = (await served.last(max_tokens=400, stop=[stop])).outputs[0]
        assert stopped.text == whole.partition(stop)[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        # Text is the gateway's business; the engine is told to stop.
        await served.running(0)
        assert served.gateway.engine_core.outstanding == {"r0": 0}


async def test_n(opened: Open) -> None:
    async with opened(FAST, 2) as served:
        from vllm.sampling_params import RequestOutputKind

        output = await served.last(n=3, temperature=1, output_kind=RequestOutputKind.FINAL_ONLY)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert {tuple(o.token_ids) for o in output.outputs} == {tuple(predicted(PROMPT, 20, FAST))}


@pytest.mark.parametrize("n", [1, 4])
async def test_cancelling_aborts_in_the_engine(opened: Open, n: int) -> None:
    async with opened(ENDLESS) as served:
        asking = asyncio.create_task(served.last(max_tokens=500, n=n, temperature=1))
        await served.running(n)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await served.running(0)
        assert served.gateway.engine_core.requests_in_flight == 0


async def test_leaving_the_stream_aborts_in_the_engine(opened: Open) -> None:
    async with opened(ENDLESS) as served:
        async with contextlib.aclosing(served.generate(max_tokens=500)) as outputs:
            await anext(outputs)
        await served.running(0)


async def test_requests_over_the_bound_are_shed(opened: Open) -> None:
    async with opened(ENDLESS, admission=Admission(max_requests=3)) as served:
        asking = [asyncio.create_task(served.last(str(number), max_tokens=500)) for number in range(2)]
        await served.running(2)
        served.gateway.check_admission(1)
        with pytest.raises(Overloaded, match="'tiny' has 2 requests in flight; at most 3 are admitted") as caught:
            served.gateway.check_admission(2)
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60
        assert (caught.value.http_status, caught.value.grpc_status) == (429, "RESOURCE_EXHAUSTED")
        asking.append(asyncio.create_task(served.last("2", max_tokens=500)))
        await served.running(3)
        # By itself too, whoever calls it.
        with pytest.raises(Overloaded):
            await served.last("3")
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        served.gateway.check_admission(3)


async def test_retry_after_is_true(opened: Open) -> None:
    async with opened(SLOW, admission=Admission(max_requests=2)) as served:
        asking = [asyncio.create_task(served.last(str(number), max_tokens=400)) for number in range(2)]
        await served.running(2)

        def told() -> tuple[float, int, float | None]:
            """When, how many tokens were left, and what a caller heard."""
            with pytest.raises(Overloaded) as caught:
                served.gateway.check_admission()
            return time.monotonic(), sum(served.gateway.engine_core.outstanding.values()), caught.value.retry_after_s

        begun_s, before, _ = told()
        await asyncio.sleep(1)
        told_s, left, retry_after_s = told()
        assert 0 < left < before
        # A place of two is told after half of the work; both end together here.
        assert retry_after_s == pytest.approx(left / 2 * (told_s - begun_s) / (before - left), rel=0.1)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        served.gateway.check_admission(2)


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"n": 4}, "at most 3"),
        ({"stop": ["\ud800"]}, "can't be sent to an engine"),
        ({"extra_args": {"hycluster_migrated": [1]}}, "hycluster_migrated"),
        ({"extra_args": {"kv_transfer_params": "x"}}, r"^kv_transfer_params: is not allowed"),
        ({"extra_args": {"ec_transfer_params": {"host": "x"}}}, r"^ec_transfer_params: is not allowed"),
        ({"bad_words": ["a", "\ud800"]}, r"^bad_words\[1\]: .* is not allowed; must be text"),
        ({"priority": -(2**63)}, r"^priority: -9223372036854775808 is not allowed; must be 0"),
        ({"priority": 2**63}, r"^priority: "),
        ({"structured_outputs": {"choice": ["a" * 100] * 1000}}, r"structured_outputs\.choice: is 104000 bytes"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_what_is_refused_leaves_nothing_behind(opened: Open, n: int, sampling: dict[str, Any], says: str) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    if (grammar := sampling.get("structured_outputs")) is not None:
        sampling = sampling | {"structured_outputs": StructuredOutputsParams(**grammar)}
    async with opened(FAST, admission=Admission(max_requests=3)) as served:
        with pytest.raises(InvalidInput, match=says):
            await served.last(**({"n": n, "temperature": 1} | sampling))
        assert served.gateway.engine_core.requests_in_flight == 0
        assert served.gateway.engine_core.outstanding == {"r0": 0}
        assert not served.gateway.output_processor.has_unfinished_requests()
        assert (await served.last()).finished


HOSTILE_OUTPUTS: list[dict[str, Any]] = [
    # 150 bytes that took 12 GB, and the event loop.
    {"json": {"type": "array", "minItems": 1_000_000_000}},
    {"json": {"properties": {f"k{n}": {"type": "string", "pattern": f"^a{{1,{n + 1}}}$"} for n in range(1000)}}},
    {"json": {"$ref": "#"}},
    {"regex": "(a{1000000000})"},
    {"grammar": 'root ::= "a"{1000000000}'},
]


@contextlib.contextmanager
def memory_limit(gib: int) -> Iterator[None]:
    """This process can't take more than that on top of what it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (gib << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("hostile", HOSTILE_OUTPUTS)
async def test_outputs_that_would_cost_gigabytes_are_refused_beside_streams(
    opened: Open, hostile: dict[str, Any]
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    async with opened(SLOW) as served:
        with memory_limit(1):
            streams = [asyncio.create_task(served.last(str(number), max_tokens=60)) for number in range(8)]
            await served.running(8)
            with pytest.raises(InvalidInput, match=r"^structured_outputs\.") as caught:
                await served.last(structured_outputs=StructuredOutputsParams(**hostile))
            assert caught.value.http_status == 400
            answers = await asyncio.gather(*streams)
    assert {tuple(answer.outputs[0].token_ids) for answer in answers} == {tuple(predicted(PROMPT, 60, SLOW))}


@pytest.mark.parametrize(
    ("ordinary", "backend"),
    [({"json": {"type": "object"}}, "xgrammar"), ({"json": {"type": "array", "uniqueItems": True}}, "refused")],
)
async def test_outputs_are_validated_as_vllm_does(opened: Open, ordinary: dict[str, Any], backend: str) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    asked = StructuredOutputsParams(**ordinary)
    async with opened(FAST) as served:
        if backend == "refused":
            with pytest.raises(VLLMValidationError, match="uniqueItems"):
                await served.last(structured_outputs=asked)
        else:
            send = served.gateway.engine_core.add_request_async
            sent: list[Any] = []

            async def seen(request: Any) -> None:
                sent.append(request.sampling_params.structured_outputs._backend)
                await send(request)

            served.gateway.engine_core.add_request_async = seen  # type: ignore[method-assign]
            assert (await served.last(structured_outputs=asked)).finished
            assert sent == [backend]


async def test_what_is_not_fetched_is_one_output_of_the_requests_own(opened: Open) -> None:
    from vllm.sampling_params import RequestOutputKind

    async with (
        opened(FAST) as served,
        contextlib.aclosing(served.generate(max_tokens=400, output_kind=RequestOutputKind.DELTA)) as outputs,
    ):
        first = await anext(outputs)
        await until(lambda: not served.gateway.engine_core.requests_in_flight)
        await asyncio.sleep(0.1)
        rest = [output async for output in outputs]
    counts = [len(output.outputs[0].token_ids) for output in (first, *rest)]
    assert sum(counts) == 400
    assert len(rest) <= 2


async def test_ids_that_are_too_long(opened: Open) -> None:
    async with opened(FAST) as served:
        with pytest.raises(InvalidInput, match="request_id"):
            await served.last("x" * 1000)


async def test_tokens_over_the_bound_are_shed(opened: Open) -> None:
    async with opened(ENDLESS, admission=Admission(max_outstanding_tokens=300)) as served:
        asking = asyncio.create_task(served.last(max_tokens=400))
        await served.running(1)
        with pytest.raises(Overloaded, match="tokens outstanding; at most 300 are admitted"):
            served.gateway.check_admission()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        served.gateway.check_admission()


async def test_without_replicas_nothing_is_admitted(opened: Open) -> None:
    async with opened(SLOW) as served:
        served.replicas[0].die()
        await until(lambda: not served.gateway.engine_core.able)
        # What the directory is told of it; which of both is seen first is chance.
        ((replica, why),) = served.gateway._losses.items()
        assert (replica, why in ("its engine ended", "its connection closed")) == ("r0", True)
        for refused in (served.gateway.check_health(), served.last()):
            with pytest.raises(Unavailable, match="no replica of 'tiny' can serve now") as caught:
                await refused
            assert (caught.value.http_status, caught.value.grpc_status) == (503, "UNAVAILABLE")


async def test_the_last_replica_goes_after_admission(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(SLOW) as served:
        monkeypatch.setattr(served.gateway, "check_admission", lambda **_: None)
        served.replicas[0].die()
        await until(lambda: not served.gateway.engine_core.able)
        with pytest.raises(Unavailable) as caught:
            await served.last()
        assert caught.value.http_status == 503
        assert not served.gateway.output_processor.has_unfinished_requests()


async def test_a_lost_replicas_streams_go_on(opened: Open) -> None:
    """Nobody sees more of it than a pause: not in the tokens, the text, or the counts."""
    async with opened(SLOW, 2) as served:
        undisturbed = await served.last("before", max_tokens=100)
        streams = [asyncio.create_task(served.last(str(number), max_tokens=100)) for number in range(4)]
        await served.running(2, 2)
        await asyncio.sleep(0.1)
        served.replicas[0].die()
        for end in await asyncio.gather(*streams):
            assert end.outputs[0].token_ids == undisturbed.outputs[0].token_ids
            assert end.outputs[0].text == undisturbed.outputs[0].text
            assert end.outputs[0].finish_reason == "length"
            assert end.num_cached_tokens == undisturbed.num_cached_tokens
        assert not served.gateway.output_processor.has_unfinished_requests()


@pytest.mark.parametrize("silent", [True, False])
async def test_a_broken_connection_is_mended_without_the_directory(silent: bool, opened: Open) -> None:
    """A head takes a while to come back; what breaks meanwhile must not wait for it."""

    async def away(*_: Any) -> Any:
        if silent:
            await asyncio.sleep(3600)
        raise RuntimeError("the directory is away")

    async with opened(SLOW, 2) as served:
        undisturbed = await served.last("before", max_tokens=100)
        directory: Any = served.gateway.directory
        directory.sync.remote = away
        stream = asyncio.create_task(served.last("disturbed", max_tokens=100))
        await asyncio.sleep(0.2)
        for link in list(served.gateway.engine_core._members.links.values()):
            link.lose("the test says so", died=False)
        end = await stream
        assert end.outputs[0].token_ids == undisturbed.outputs[0].token_ids
        await until(lambda: served.gateway.engine_core.links == 2)


async def test_sequences_of_one_request_go_on_wherever_they_are(opened: Open) -> None:
    from vllm.sampling_params import RequestOutputKind

    async with opened(SLOW, 2) as served:
        final = RequestOutputKind.FINAL_ONLY
        stream = asyncio.create_task(served.last(n=4, temperature=1, max_tokens=100, output_kind=final))
        await served.running(2, 2)
        await asyncio.sleep(0.1)
        served.replicas[0].die()
        lengths = {output.index: len(output.token_ids) for output in (await stream).outputs}
        assert lengths == dict.fromkeys(range(4), 100)
        assert served.gateway.engine_core.requests_in_flight == 0


async def test_a_lost_sequence_takes_its_siblings_along(opened: Open) -> None:
    async with opened(ENDLESS, 2, router=Router(failover=False)) as served:
        stream = asyncio.create_task(served.last(n=4, temperature=1, max_tokens=500))
        await served.running(2, 2)
        await asyncio.sleep(0.1)
        served.replicas[0].die()
        with pytest.raises(Unavailable, match="lost"):
            await stream
        await asyncio.to_thread(eventually, lambda: served.replicas[1].requests == 0)
        assert served.gateway.engine_core.requests_in_flight == 0
        assert not served.gateway.output_processor.has_unfinished_requests()


async def test_a_request_that_kills_replicas_is_told_so(opened: Open) -> None:
    async with opened(SLOW, 3) as served:
        for replica in served.replicas.replicas:
            replica.engine.hang()
        asking = asyncio.create_task(served.last())
        pool = served.gateway.engine_core

        def fewer(links: int) -> bool:
            return pool.links < links

        for _ in range(3):
            await until(lambda: any(f.taken or not f.losses for f in pool._failover.flights.values()))
            (flight,) = pool._failover.flights.values()
            victim = served.replicas[int(flight.replica_id[1:])]
            await asyncio.to_thread(eventually, partial(getattr, victim, "requests"))
            gone = partial(fewer, pool.links)
            victim.die()
            await until(gone)
        with pytest.raises(KillsReplicas, match="on 3 replicas in a row when they died") as caught:
            await asking
        assert (caught.value.http_status, caught.value.grpc_status) == (422, "FAILED_PRECONDITION")


async def test_opening_waits_for_a_replica(tiny_model: Path) -> None:
    from hycluster.gateway.opening import open_gateway

    model = Model(name="tiny", source=str(tiny_model), simulated=FAST, engine={"max_model_len": 1024})
    with SimulatedPool(FAST, 0) as nobody, pytest.raises(Unavailable, match="could serve within 0 s"):
        async with open_gateway(model, nobody.directory(model), router=Router(), admission=Admission(), wait_s=0.2):
            raise AssertionError("it must not open")


@pytest.mark.parametrize("kind", ["PoolOverloaded", "PoolInvalidInput", "PoolUnavailable", "PoolReplicaLost"])
def test_errors_that_are_vllms_as_well_are_told_by_grpc(kind: str) -> None:
    import grpc

    from hycluster.gateway import pool_errors
    from hycluster.ingress.status import rich_status

    error = getattr(pool_errors, kind)("why", *([2.0] if kind == "PoolOverloaded" else []))
    status = rich_status(error)
    assert (status.message, status.code) == ("why", grpc.StatusCode[error.grpc_status].value[0])
