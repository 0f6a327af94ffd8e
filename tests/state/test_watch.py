from __future__ import annotations

import asyncio

import pytest
import ray

from hycluster.directory.directory import Survey
from hycluster.pool_health import PoolHealth
from hycluster.state.cluster_state import BatchState
from hycluster.state.watch import StateWatch
from tests.state.made import BIG, SMALL, made_batches, made_pools, made_survey


class Sources:
    """What a watch asks, and how often it did."""

    def __init__(self) -> None:
        self.surveys = 0
        self.reads = 0
        self.error: BaseException | None = None

    async def survey(self) -> Survey:
        self.surveys += 1
        if self.error:
            raise self.error
        return made_survey()

    async def pools(self) -> dict[str, PoolHealth]:
        return made_pools()

    def batches(self) -> list[BatchState]:
        self.reads += 1
        if self.error:
            raise OSError("s3://key:secret@bucket is away")
        return made_batches()


async def test_however_many_look_it_is_read_once() -> None:
    sources = Sources()
    watch = StateWatch(sources.survey, sources.pools, sources.batches)
    states = await asyncio.gather(*(watch.now() for _ in range(20)))
    assert (sources.surveys, sources.reads) == (1, 1)
    assert {state.state for state in states} == {"starting"}
    assert states[0].batches == tuple(made_batches())
    watch.open(sources.pools)
    assert (await watch.now()).state == "degraded"
    # The store is asked less often.
    assert (sources.surveys, sources.reads) == (2, 1)
    await watch.close()


@pytest.mark.parametrize("error", [ray.exceptions.RayActorError(), TimeoutError()])
async def test_what_does_not_answer_is_a_problem_and_the_rest_is_told(error: BaseException) -> None:
    sources = Sources()
    sources.error = error
    watch = StateWatch(sources.survey, sources.pools, sources.batches)
    watch.open(sources.pools)
    state = await watch.now()
    assert [pool.model for pool in state.pools] == [BIG, SMALL]
    assert any("the directory does not answer" in problem for problem in state.problems)
    await asyncio.sleep(0)
    watch.open(sources.pools)
    # Its message may hold keys.
    assert "batches.store: can't be read: OSError" in (await watch.now()).problems
    assert "secret" not in str(state.told())
    await watch.close()


async def test_without_a_batch_api() -> None:
    sources = Sources()
    assert (await StateWatch(sources.survey, sources.pools, None).now()).batches is None
