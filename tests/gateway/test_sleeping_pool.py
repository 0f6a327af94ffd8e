"""A gateway over a pool that sleeps: who waits, who is refused, and that both wake it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import GenerationRequest, Sampling
from hycluster.directory.autoscaling import PoolLoad, Scaling
from hycluster.errors import DeadlineExceeded, Overloaded, Unavailable
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Autoscaling, Replicas
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedPool, predicted
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
PROMPT = [10, 20, 30]
ASK = GenerationRequest(model="tiny", token_ids=PROMPT, sampling=Sampling(max_tokens=8, ignore_eos=True))
ASLEEP = Scaling(target=0, running=0, cold_start_s=20.0)


class Sleeping:
    """A generator, the replicas behind it, of which there is none at first, and what stands for the scaler."""

    def __init__(self, generator: Generator, replicas: SimulatedPool, known: Any) -> None:
        self.generator = generator
        self.replicas = replicas
        self.pool = generator.gateways["tiny"].engine_core
        self._known = known

    def load(self, scaling: Scaling = ASLEEP) -> PoolLoad:
        load: PoolLoad = self._known.scale("tiny", scaling)
        return load

    async def told(self, **wanted: int) -> PoolLoad:
        """What the scaler hears, once it is this."""
        await until(lambda: all(getattr(self.load(), name) == value for name, value in wanted.items()))
        return self.load()


@contextlib.asynccontextmanager
async def asleep(
    source: Path, admission: Admission | None = None, patient: bool = False, **rules: Any
) -> AsyncIterator[Sleeping]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway

    model = Model(
        name="tiny",
        source=str(source),
        simulated=ENGINE,
        engine={"max_model_len": 1024},
        replicas=Replicas(min=0, max=2),
        autoscaling=Autoscaling(**rules),
    )
    with SimulatedPool(ENGINE, 0) as simulated:
        directory = simulated.directory(model)
        directory.known.scale("tiny", ASLEEP)
        opening = open_gateway(
            model, directory, router=Router(), admission=admission or Admission(), wait_s=60, patient=patient
        )
        async with opening as gateway:
            yield Sleeping(Generator({"tiny": gateway}), simulated, directory.known)


async def test_a_caller_waits_and_is_answered_like_any_other(tiny_model: Path) -> None:
    async with asleep(tiny_model) as sleeping:
        assert await sleeping.generator.ready()
        health = (await sleeping.generator.pools())["tiny"]
        assert (health.replicas_ready, health.replicas_wanted, health.wakes) == (0, 0, True)
        asked = asyncio.create_task(sleeping.generator.generate(ASK))
        load = await sleeping.told(waiting_requests=1)
        assert load.outstanding_tokens == len(PROMPT) + 8
        assert not asked.done()
        sleeping.replicas.start()
        (output,) = (await asked).outputs
        assert output.token_ids == predicted(PROMPT, 8, ENGINE)
        await sleeping.told(waiting_requests=0, outstanding_tokens=0)
        # What only a started engine knows has come with it.
        assert sleeping.generator.gateways["tiny"].model_config.max_model_len == ENGINE.max_model_len


async def test_all_sequences_of_a_request_wait(tiny_model: Path) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True, n=3)
    async with asleep(tiny_model) as sleeping:
        asked = asyncio.create_task(
            sleeping.generator.generate(GenerationRequest(model="tiny", token_ids=PROMPT, sampling=sampling))
        )
        await sleeping.told(waiting_requests=3)
        sleeping.replicas.start()
        assert [o.token_ids for o in (await asked).outputs] == [predicted(PROMPT, 8, ENGINE)] * 3


async def test_who_gives_up_waits_no_more(tiny_model: Path) -> None:
    async with asleep(tiny_model) as sleeping:
        with pytest.raises(DeadlineExceeded):
            await sleeping.generator.generate(ASK, deadline_s=0.2)
        asked = asyncio.create_task(sleeping.generator.generate(ASK))
        await sleeping.told(waiting_requests=1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await sleeping.told(waiting_requests=0, outstanding_tokens=0)
        # Nothing of them is left behind, and nothing is sent when there is a replica.
        assert not sleeping.pool._failover.tasks
        replica = sleeping.replicas.start()
        await until(lambda: sleeping.pool.able)
        assert replica.requests == 0


async def test_the_wait_has_an_end(tiny_model: Path) -> None:
    async with asleep(tiny_model, max_cold_start_wait_s=0.2) as sleeping:
        with pytest.raises(Unavailable, match=r"no replica of 'tiny' could serve within 0.2 s"):
            await sleeping.generator.generate(ASK)
        assert sleeping.pool.requests_in_flight == 0


async def test_what_waits_is_bounded_like_what_runs(tiny_model: Path) -> None:
    bounds = Admission(max_requests=3, max_outstanding_tokens=20)
    async with asleep(tiny_model, bounds) as sleeping:
        asked = [asyncio.create_task(sleeping.generator.generate(ASK)) for _ in range(2)]
        await sleeping.told(waiting_requests=2)
        with pytest.raises(Overloaded, match="22 tokens outstanding; at most 20 are admitted"):
            await sleeping.generator.generate(ASK)
        sleeping.replicas.start()
        await asyncio.gather(*asked)


async def test_who_is_refused_hears_when_to_come_back_and_wakes_it(tiny_model: Path) -> None:
    async with asleep(tiny_model, cold_start="refuse") as sleeping:
        await until(lambda: sleeping.generator.gateways["tiny"].cold_start.scaling is not None)
        # Those who are refused must come, and so it says that it can serve.
        assert await sleeping.generator.ready()
        assert sleeping.load().waiting_requests == 0
        with pytest.raises(Unavailable, match=r"'tiny' is starting, .* the last start took 20 s") as refused:
            await sleeping.generator.generate(ASK)
        assert 20 <= (refused.value.retry_after_s or 0) <= 25
        await sleeping.told(waiting_requests=1, outstanding_tokens=0)
        sleeping.replicas.start()
        await until(lambda: sleeping.pool.able)
        assert (await sleeping.generator.generate(ASK)).outputs[0].token_ids == predicted(PROMPT, 8, ENGINE)


async def test_a_batch_job_waits_whatever_callers_are_told(tiny_model: Path) -> None:
    async with asleep(tiny_model, patient=True, cold_start="refuse") as sleeping:
        asked = asyncio.create_task(sleeping.generator.generate(ASK))
        await sleeping.told(waiting_requests=1)
        sleeping.replicas.start()
        await asked
