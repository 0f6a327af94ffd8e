"""The control calls over a pool: what each replica is asked, and what the caller hears.

Real sockets, and engines that are simulated and have their control methods simulated too. A real engine's are in
``tests/integration/test_migrated.py``.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.engine import messages
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import HyclusterError, Unavailable
from hycluster.gateway.router import make_policy
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.settings.simulated import Simulated
from tests.engine_requests import PROMPT, ask
from tests.simulated_pool import SimulatedPool, predicted
from tests.waiting import PATIENCE_S, eventually, until

if TYPE_CHECKING:
    from hycluster.gateway.pool import PoolClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, step_base_s=0.01, decode_token_s=0.0)
LOST = "the replica was lost before it answered"


class ControlledSimulatedEngine(SimulatedEngine):
    """Has what vLLM's engine core does at these calls, as far as its gateways see it.

    Attributes:
        asked: the calls so far, as they came.
        mute: it answers none any more.
        refusal: what it says against every call; None: it does as it is told.
        answers: by method, what it says in place of the truth.
    """

    def __init__(self, settings: Simulated) -> None:
        super().__init__(settings)
        self.asked: list[tuple[str, list[Any]]] = []
        self.mute = False
        self.refusal: str | None = None
        self.answers: dict[str, Any] = {}

    def call(self, client: int, call_id: int, method: str, args: Sequence[Any]) -> None:
        self.asked.append((method, list(args)))
        if self.mute:
            return
        if self.refusal is not None:
            answer = messages.UtilityOutput(call_id, failure_message=self.refusal)
        else:
            answer = messages.UtilityOutput(call_id, result=(None, self._obey(method, args)))
        self._send(client, messages.EngineCoreOutputs(utility_output=answer, timestamp=time.monotonic()))

    def _obey(self, method: str, args: Sequence[Any]) -> Any:
        if method in self.answers:
            return self.answers[method]
        if method in ("sleep", "pause_scheduler"):
            self.hang()
            if args[method == "sleep"] == "abort":
                self.give_back()
        elif method in ("wake_up", "resume_scheduler"):
            with self._changed:
                self._hanging = False
                self._changed.notify_all()
        elif method in ("is_sleeping", "is_scheduler_paused"):
            return self._hanging
        return True if method in ("wake_up", "reset_prefix_cache") else None


class Pool:
    """A client, the replicas that it is connected to, and what it was told of lost requests."""

    def __init__(self, client: PoolClient, replicas: SimulatedPool, lost: dict[str, HyclusterError]) -> None:
        self.client = client
        self.replicas = replicas
        self.lost = lost

    @property
    def engines(self) -> list[Any]:
        return [replica.engine for replica in self.replicas.replicas]

    async def asked(self, call: tuple[str, list[Any]]) -> None:
        """Wait until all replicas have got this call."""
        await asyncio.to_thread(eventually, lambda: all(call in engine.asked for engine in self.engines))

    async def hear(self) -> None:
        """What the directory says, as it does twice a second."""
        await self.client.update(self.replicas.reports)

    async def finish(self, requests: int) -> dict[str, list[int]]:
        """Tokens by request, until this many have ended."""
        tokens: dict[str, list[int]] = {}
        while requests:
            for output in (await self.client.get_output_async()).outputs:
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                requests -= output.finish_reason is not None
        return tokens


@asynccontextmanager
async def opened(replicas: int = 3) -> AsyncIterator[Pool]:
    from hycluster.gateway.pool import PoolClient

    lost: dict[str, HyclusterError] = {}

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        lost[request_id] = error

    with SimulatedPool(ENGINE, replicas, ControlledSimulatedEngine) as simulated:
        policy = make_policy("least_outstanding_tokens", "me", seed=0)
        client = PoolClient("tiny", policy, "me", wait_s=60, on_lost=on_lost)
        try:
            pool = Pool(client, simulated, lost)
            async with asyncio.timeout(PATIENCE_S):
                # On a busy machine it does not wait for those that take long to connect.
                while client.links < replicas:
                    await pool.hear()
            yield pool
        finally:
            await client.close()


Call = Callable[["PoolClient"], Awaitable[Any]]
# What the pool is asked, what each of its replicas is to be asked, and what the caller hears.
CALLS: list[tuple[Call, tuple[str, list[Any]], Any]] = [
    (lambda c: c.is_sleeping_async(), ("is_sleeping", []), False),
    (lambda c: c.sleep_async(2, "keep"), ("sleep", [2, "keep"]), None),
    (lambda c: c.is_sleeping_async(), ("is_sleeping", []), True),
    (lambda c: c.wake_up_async(["weights"]), ("wake_up", [["weights"]]), True),
    (lambda c: c.is_scheduler_paused_async(), ("is_scheduler_paused", []), False),
    (lambda c: c.pause_scheduler_async("keep", False), ("pause_scheduler", ["keep", False]), None),
    (lambda c: c.is_scheduler_paused_async(), ("is_scheduler_paused", []), True),
    (lambda c: c.resume_scheduler_async(), ("resume_scheduler", []), None),
    (lambda c: c.is_scheduler_paused_async(), ("is_scheduler_paused", []), False),
    (lambda c: c.reset_prefix_cache_async(True, False), ("reset_prefix_cache", [True, False]), True),
    (lambda c: c.reset_mm_cache_async(), ("reset_mm_cache", []), None),
    (lambda c: c.reset_encoder_cache_async(), ("reset_encoder_cache", []), None),
]


async def test_every_replica_gets_every_call_as_its_engine_takes_it() -> None:
    from vllm.v1.engine.core import EngineCore

    wanted = [asked for _, asked, _ in CALLS]
    async with opened() as pool:
        for call, (method, arguments), answer in CALLS:
            assert await call(pool.client) is answer, method
            inspect.signature(getattr(EngineCore, method)).bind(None, *arguments)
        asked = [engine.asked for engine in pool.engines]
    assert asked[0] == asked[1] == asked[2] == wanted


@pytest.mark.parametrize("method", ["is_sleeping", "is_scheduler_paused", "wake_up", "reset_prefix_cache"])
async def test_a_pool_is_or_has_done_what_all_of_its_replicas_are_or_have(method: str) -> None:
    async with opened() as pool:
        ask_all = getattr(pool.client, f"{method}_async")
        for engine in pool.engines:
            engine.answers[method] = True
        assert await ask_all() is True
        pool.engines[1].answers[method] = False
        assert await ask_all() is False


async def test_requests_stand_still_between_pause_and_resume() -> None:
    async with opened(2) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, 40))
        await pool.client.get_output_async()
        await pool.client.pause_scheduler_async("keep", False)
        await pool.client.add_request_async(ask("c", 40))
        # A step that had begun is still told of.
        await asyncio.sleep(0.1)
        flights = pool.client._failover.flights
        had = {name: list(flight.output) for name, flight in flights.items()}
        await asyncio.sleep(0.2)
        assert {name: flight.output for name, flight in flights.items()} == had
        assert had.keys() == set("abc")
        assert had["c"] == []
        await pool.client.resume_scheduler_async()
        tokens = await pool.finish(3)
        whole = predicted(PROMPT, 40, ENGINE)
        assert {name: whole[-len(got) :] for name, got in tokens.items()} == tokens
        assert tokens["c"] == whole
        assert pool.lost == {}


@pytest.mark.parametrize(("stop", "go_on"), [("pause_scheduler", "resume_scheduler"), ("sleep", "wake_up")])
async def test_what_engines_abort_at_a_pause_goes_on_after_it(stop: str, go_on: str) -> None:
    """Not as with one engine: over a pool an engine's abort is the end of a replica, not of a request."""
    async with opened(2) as pool:
        for name in "ab":
            await pool.client.add_request_async(ask(name, 40))
        await asyncio.to_thread(eventually, lambda: all(replica.requests for replica in pool.replicas.replicas))
        await getattr(pool.client, f"{stop}_async")()
        assert [engine.asked[-1][0] for engine in pool.engines] == [stop] * 2
        # No replica takes them any more, until the directory says the next time that these do.
        await pool.hear()
        await asyncio.to_thread(eventually, lambda: sum(r.requests for r in pool.replicas.replicas) == 2)
        assert pool.client.requests_waiting == 0
        await getattr(pool.client, f"{go_on}_async")()
        whole = predicted(PROMPT, 40, ENGINE)
        assert {name: whole[-len(got) :] == got for name, got in (await pool.finish(2)).items()} == {
            "a": True,
            "b": True,
        }
        assert pool.lost == {}


async def test_a_replica_that_is_lost_in_the_middle_of_a_call() -> None:
    async with opened() as pool:
        pool.engines[0].mute = True
        calling = asyncio.create_task(pool.client.sleep_async(1, "keep"))
        await pool.asked(("sleep", [1, "keep"]))
        assert not calling.done()
        pool.replicas[0].die()
        with pytest.raises(Unavailable, match=LOST) as caught:
            await calling
        assert caught.value.retry_after_s == 1.0
        # The others have done it, and are asked without it from now on.
        assert await pool.client.is_sleeping_async() is True
        assert await pool.client.wake_up_async() is True
        assert [engine.asked[-1][0] for engine in pool.engines] == ["sleep", "wake_up", "wake_up"]


async def test_a_replica_that_is_lost_before_the_call_leaves() -> None:
    async with opened() as pool:
        calling = asyncio.create_task(pool.client.sleep_async(1, "keep"))
        await asyncio.sleep(0)
        pool.client._members.links["r1"].lose("the test says so")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(Unavailable, match=LOST):
                await calling


async def test_the_last_replica_is_lost_in_the_middle_of_a_call() -> None:
    async with opened(1) as pool:
        pool.engines[0].mute = True
        calling = asyncio.create_task(pool.client.reset_prefix_cache_async())
        await pool.asked(("reset_prefix_cache", [False, False]))
        pool.replicas[0].die()
        with pytest.raises(Unavailable, match=LOST):
            await calling
        with pytest.raises(Unavailable, match="no replica of 'tiny' can serve now"):
            await pool.client.reset_prefix_cache_async()


async def test_a_gateway_that_closes_leaves_no_call_waiting() -> None:
    async with opened(2) as pool:
        for engine in pool.engines:
            engine.mute = True
        calling = asyncio.create_task(pool.client.sleep_async(1, "keep"))
        await pool.asked(("sleep", [1, "keep"]))
        await pool.client.close()
        with pytest.raises(Unavailable, match=LOST):
            await calling


async def test_a_replica_that_joins_has_not_had_earlier_calls() -> None:
    async with opened(2) as pool:
        await pool.client.sleep_async(1, "keep")
        assert await pool.client.is_sleeping_async() is True
        pool.replicas.start()
        await pool.hear()
        assert pool.engines[2].asked == []
        # So the pool does not sleep any more: who comes to that one is answered, and the others wait.
        assert await pool.client.is_sleeping_async() is False
        for name in "abc":
            await pool.client.add_request_async(ask(name))
        answered = await pool.finish(1)
        await asyncio.to_thread(eventually, lambda: [r.requests for r in pool.replicas.replicas] == [1, 1, 0])
        # All hear what is said from now on.
        assert await pool.client.wake_up_async() is True
        assert [engine.asked[-1] for engine in pool.engines] == [("wake_up", [None])] * 3
        assert answered | await pool.finish(2) == dict.fromkeys("abc", predicted(PROMPT, 5, ENGINE))


async def test_one_that_drains_is_asked_too() -> None:
    async with opened(2) as pool:
        pool.replicas[0].accepting = False
        await pool.hear()
        assert await pool.client.reset_prefix_cache_async() is True
        assert [engine.asked for engine in pool.engines] == [[("reset_prefix_cache", [False, False])]] * 2


async def test_what_one_engine_says_against_it_the_caller_hears() -> None:
    async with opened() as pool:
        pool.engines[1].refusal = "Call to sleep method failed: no sleep mode"
        with pytest.raises(RuntimeError, match="Call to sleep method failed: no sleep mode"):
            await pool.client.sleep_async(1, "keep")
        # It has reached the others, nothing is taken back.
        await asyncio.to_thread(eventually, lambda: [e._hanging for e in pool.engines] == [True, False, True])
        pool.engines[1].refusal = None
        assert await pool.client.is_sleeping_async() is False
        assert pool.client.links == 3


async def test_all_engines_refuse() -> None:
    async with opened() as pool:
        for number, engine in enumerate(pool.engines):
            engine.refusal = f"refused by {number}"
        with pytest.raises(RuntimeError, match=r"^refused by \d$"):
            await pool.client.pause_scheduler_async()
        for engine in pool.engines:
            engine.refusal = None
        assert await pool.client.is_scheduler_paused_async() is False


async def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.gateway import link

    monkeypatch.setattr(link, "CALL_TIMEOUT_S", 0.2)
    async with opened(2) as pool:
        pool.engines[0].mute = True
        with pytest.raises(TimeoutError):
            await pool.client.pause_scheduler_async("keep", False)
        # It lives, for all that is known; its late answer disturbs nobody.
        pool.engines[0].mute = False
        pool.engines[0].call(1, 1, "is_sleeping", [])
        assert pool.client.links == 2
        assert await pool.client.is_scheduler_paused_async() is False


async def test_the_calls_of_vllms_front_end(tiny_model: Path) -> None:
    """As ``AsyncLLM`` has them, over the whole pool."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from hycluster.gateway.opening import open_gateway

    model = Model(
        name="tiny",
        source=str(tiny_model),
        simulated=ENGINE,
        engine={"max_model_len": 1024},
        replicas=Replicas(min=2),
    )
    with SimulatedPool(ENGINE, 2, ControlledSimulatedEngine) as simulated:
        opening = open_gateway(
            model, simulated.directory(model), router=Router(), admission=Admission(), wait_s=60, metrics=False
        )
        async with opening as gateway:
            await until(lambda: gateway.engine_core.links == 2)

            async def answer(name: str) -> list[int]:
                params = SamplingParams(max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
                (prompt,) = await gateway.renderer.render_cmpl_async([{"prompt_token_ids": PROMPT}])
                (last,) = [output async for output in gateway.generate(prompt, params, name)]
                return list(last.outputs[0].token_ids)

            await gateway.pause_generation(mode="keep")
            assert await gateway.is_paused() is True
            asking = [asyncio.create_task(answer(name)) for name in "abcd"]
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in asking)
            await gateway.resume_generation()
            assert await gateway.is_paused() is False
            assert await asyncio.gather(*asking) == [predicted(PROMPT, 20, ENGINE)] * 4

            # Those that are asked to stop at once are waited for all the same: they go on after the wake-up.
            asking = [asyncio.create_task(answer(name)) for name in "efgh"]
            await asyncio.to_thread(eventually, lambda: sum(r.requests for r in simulated.replicas) == 4)
            await gateway.sleep()
            assert await gateway.is_sleeping() is True
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in asking)
            assert await gateway.wake_up() is True
            assert await asyncio.gather(*asking) == [predicted(PROMPT, 20, ENGINE)] * 4
            assert await gateway.reset_prefix_cache() is True
            first, second = (replica.engine for replica in simulated.replicas)
            assert isinstance(first, ControlledSimulatedEngine)
            assert isinstance(second, ControlledSimulatedEngine)
            assert first.asked == second.asked
