"""A job's first rows through a real gRPC ingress; both it and the job's own gateway have stand-ins behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from hycluster.batch.task import JobBackend
from hycluster.core import Generation, GenerationRequest, Priority, Sampling
from hycluster.errors import InvalidInput, JobFailed, KillsReplicas, Unavailable, UnknownModel
from hycluster.first_rows import EARLY_ROWS, open_first_rows
from tests.batch import stand_in as batch_stand_in
from tests.ingress import stand_in as ingress_stand_in
from tests.ingress.stand_in import MODEL, open_ingress
from tests.waiting import until

NEVER_S = 60.0


@pytest.fixture
def ingress() -> ingress_stand_in.StandInGenerator:
    return ingress_stand_in.StandInGenerator()


@pytest_asyncio.fixture
async def address(ingress: ingress_stand_in.StandInGenerator) -> AsyncIterator[str]:
    async with open_ingress(ingress) as opened:
        yield f"127.0.0.1:{opened.port}"


class Gateway(batch_stand_in.StandInGenerator):
    """The job's own, which answers in capitals; ``own`` opens it when ``may_open`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.wanted = False

    def own(self) -> AbstractAsyncContextManager[JobBackend]:
        self.wanted = True
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[JobBackend]:
        await self.may_open.wait()
        yield self


def row(content: Any = "one two", **fields: Any) -> GenerationRequest:
    message = {"role": "user", "content": content, **fields}
    return GenerationRequest(
        model=MODEL, messages=[message], priority=Priority.BATCH, request_id="r", sampling=Sampling(max_tokens=2)
    )


def text(answer: Generation) -> str:
    return answer.text.strip()


async def test_rows_go_by_the_ingress_until_the_gateway_is_open(
    address: str, ingress: ingress_stand_in.StandInGenerator
) -> None:
    gateway = Gateway()
    gateway.may_open.clear()
    async with open_first_rows(address, gateway.own, 0.05) as rows:
        places = rows.lane(MODEL, "job")
        assert text(await rows.generate(row())) == "w0 w1"
        # The ingress has it wait for the job's places there.
        assert [asked.job for asked, _ in ingress.requests] == ["job"]
        assert await rows.models() == [ingress_stand_in.CARD]
        assert await asyncio.to_thread(rows.token_counter(MODEL), ["a b", "c"]) == [2, 1]
        ingress.pause_s = 0.2
        begun = asyncio.create_task(rows.generate(row()))
        await ingress.until_busy()
        gateway.may_open.set()
        await until(rows._own.done)
        assert text(await rows.generate(row())) == "ONE TWO"
        # What was under way stays where it is.
        assert text(await begun) == "w0 w1"
        await places.acquire()
        assert gateway.lanes.held == 1
    assert len(ingress.requests) == 2


async def test_a_job_that_is_through_soon_opens_no_gateway(address: str) -> None:
    gateway = Gateway()
    async with open_first_rows(address, gateway.own, NEVER_S) as rows:
        assert text(await rows.generate(row())) == "w0 w1"
    assert not gateway.wanted


@pytest.mark.parametrize("error", [Unavailable("away"), UnknownModel(MODEL, [])])
async def test_an_ingress_that_fails_a_row_is_asked_no_more(
    address: str, ingress: ingress_stand_in.StandInGenerator, error: Exception
) -> None:
    """At once, whenever the gateway was to be opened; the row is asked there."""
    ingress.error, gateway = error, Gateway()
    async with open_first_rows(address, gateway.own, NEVER_S) as rows:
        assert text(await rows.generate(row())) == "ONE TWO"
        ingress.error = None
        assert text(await rows.generate(row())) == "ONE TWO"
    assert len(ingress.requests) == 1


async def test_there_may_be_no_ingress_any_more(address: str) -> None:
    gateway = Gateway()
    async with open_first_rows("127.0.0.1:1", gateway.own, NEVER_S) as rows:
        assert await asyncio.to_thread(rows.token_counter(MODEL), ["a b"]) == [2]
        assert text(await rows.generate(row())) == "ONE TWO"


@pytest.mark.parametrize("error", [InvalidInput("prompt: no"), KillsReplicas("3 replicas died")])
async def test_what_is_the_rows_own_stays_with_it(
    address: str, ingress: ingress_stand_in.StandInGenerator, error: Exception
) -> None:
    ingress.error, gateway = error, Gateway()
    async with open_first_rows(address, gateway.own, NEVER_S) as rows:
        with pytest.raises(type(error)):
            await rows.generate(row())
        ingress.error = None
        assert text(await rows.generate(row())) == "w0 w1"
    assert not gateway.wanted


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
        {"content": "one two", "mood": "good"},
        {"content": None, "tool_calls": [{"type": "function"}]},
        {"content": None},
        {"content": "x" * 1_000_001},
    ],
)
async def test_what_grpc_does_not_carry_waits_for_the_gateway(
    address: str, ingress: ingress_stand_in.StandInGenerator, message: dict[str, Any]
) -> None:
    async with open_first_rows(address, Gateway().own, NEVER_S) as rows:
        assert (await rows.generate(row(**message))).outputs[0].text.isupper()
    assert not ingress.requests


async def test_the_ingress_gets_few_rows_at_a_time_and_the_gateway_all(address: str) -> None:
    gateway = Gateway()
    gateway.may_open.clear()
    async with open_first_rows(address, gateway.own, 0) as rows:
        places = rows.lane(MODEL, "job", None, 50)
        waiting = [asyncio.create_task(places.acquire()) for _ in range(60)]
        await until(lambda: sum(task.done() for task in waiting) == EARLY_ROWS)
        waiting[-1].cancel()
        gateway.may_open.set()
        await until(lambda: sum(task.done() for task in waiting) == 60)
        assert gateway.lanes.held == 59 - EARLY_ROWS
        for _ in range(59):
            places.release()
        assert (gateway.lanes.held, places._early.held) == (0, 0)  # type: ignore[attr-defined]


async def test_a_gateway_that_cannot_be_opened_ends_the_job(address: str) -> None:
    def own() -> AbstractAsyncContextManager[JobBackend]:
        raise ImportError("no such module")

    async with open_first_rows(address, own, 0) as rows:
        await until(rows._own.done)
        with pytest.raises(JobFailed, match="no such module"):
            await rows.generate(row())
