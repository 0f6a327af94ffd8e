"""Answers that run when their key is revoked, expires, or its project is archived."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Container, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from hycluster.auth.caller import LEEWAY_S, Caller
from hycluster.auth.guard import Guard
from hycluster.client import AsyncClient
from hycluster.errors import HyclusterError, Unauthenticated
from hycluster.ingress.ending import ending
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool

pytestmark = pytest.mark.timeout(120)

# An answer takes half a minute.
ENGINE = Simulated(vocab_size=256, max_model_len=512, step_base_s=0.07)
LONG = 450


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as known:
        yield known


class StandInRunning:
    """Attributes: callers: for whom something runs. told: the errors that were told."""

    def __init__(self, *callers: Caller) -> None:
        self.callers = set(callers)
        self.told: list[HyclusterError] = []

    async def end(self, error: HyclusterError, of: Container[Caller]) -> None:
        self.told.append(error)
        self.callers = {caller for caller in self.callers if caller not in of}


async def left_of(running: StandInRunning, number: int) -> None:
    while len(running.callers) != number:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_who_has_ended(keys: Keyed) -> None:
    guard = keys.guard
    kept, revoked = [await guard.caller(keys.key()) for _ in range(2)]
    archived, brief = await guard.caller(keys.key(other=True)), await guard.caller(keys.key(lasts_s=2))
    running = StandInRunning(kept, revoked, archived, brief)
    async with ending(running, guard):
        # Told apart though they have one name.
        assert (kept.owner, kept.key) == (revoked.owner, revoked.key)
        keys.store.revoke_key(revoked.key_id)
        await left_of(running, 2)
        assert running.callers <= {kept, archived, brief}
        keys.store.archive_project(keys.store.project("acme", "other"))
        await left_of(running, 1)
        assert running.callers == {kept}
    assert {type(error) for error in running.told} == {Unauthenticated}


async def test_a_successor_does_not_keep_the_old_one(keys: Keyed) -> None:
    caller = await keys.guard.caller(keys.key())
    running = StandInRunning(caller)
    async with ending(running, keys.guard):
        keys.store.rotate_key(caller.key_id)
        await left_of(running, 0)


async def test_while_the_database_is_away_nobody_ends(keys: Keyed) -> None:
    caller = await keys.guard.caller(keys.key())
    away = keys.file.rename(keys.file.with_suffix(".elsewhere"))
    with pytest.raises(HyclusterError):
        keys.store.all_keys()
    assert not keys.guard.has_ended(caller)
    away.rename(keys.file)


async def test_tokens_end_by_their_time_and_with_their_project(keys: Keyed) -> None:
    def by_token(ends_in_s: float, project: str = "elsewhere") -> Caller:
        return Caller("acme", project, "alice", expires_at=time.time() + ends_in_s)

    assert not keys.guard.has_ended(by_token(1 - LEEWAY_S))
    assert keys.guard.has_ended(by_token(-1 - LEEWAY_S))
    assert Guard(None).has_ended(by_token(-1 - LEEWAY_S))
    assert not keys.guard.has_ended(by_token(60, "search"))
    keys.archive()
    assert keys.guard.has_ended(by_token(60, "search"))


async def test_a_look_that_fails_is_not_the_last(keys: Keyed) -> None:
    class Broken(StandInRunning):
        async def end(self, error: HyclusterError, of: Container[Caller]) -> None:
            if not self.told:
                self.told.append(error)
                raise RuntimeError("once")
            await super().end(error, of)

    running = Broken(await keys.guard.caller(keys.key()))
    keys.revoke_all()
    async with ending(running, keys.guard):
        await left_of(running, 0)


@contextlib.asynccontextmanager
async def both_ingresses(tiny_model: Path, keys: Keyed, *, end: bool) -> AsyncIterator[tuple[int, int, Any]]:
    """Their ports, over vLLM's own app and a simulated engine; and what is in flight."""
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.grpc import serve_grpc
    from hycluster.ingress.http import serve_http

    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    with SimulatedPool(ENGINE, 1) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=10
        ) as gateway:
            generator = Generator({model.name: gateway})
            async with ending(generator, keys.guard if end else None):
                http = await serve_http(generator, Http(port=0), guard=keys.guard, drain_timeout_s=1)
                grpc = await serve_grpc(generator, Grpc(port=0), guard=keys.guard)
                try:
                    yield http.port, grpc.port, gateway
                finally:
                    await grpc.stop(0)
                    await http.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_imported")
async def test_streams_end_at_both_ingresses(tiny_model: Path, keys: Keyed) -> None:
    lost, kept = keys.key(), keys.key()
    async with both_ingresses(tiny_model, keys, end=True) as (http, grpc, gateway):
        by_http = [
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{http}/v1", api_key=key, max_retries=0)
            for key in (lost, kept)
        ]
        by_grpc = [AsyncClient(f"127.0.0.1:{grpc}", api_key=key) for key in (lost, kept)]
        began = asyncio.Semaphore(0)

        async def over_http(client: openai.AsyncOpenAI, *, stream: bool, n: int = 1) -> None:
            asked: Any = {"model": "tiny", "prompt": "hi", "max_tokens": LONG, "extra_body": {"ignore_eos": True}}
            if not stream:
                began.release()
                await client.completions.create(**asked, n=n)
                return
            async for _ in await client.completions.create(**asked, n=n, stream=True):
                began.release()

        async def over_grpc(client: AsyncClient) -> None:
            async for _ in client.stream("tiny", prompt="hi", max_tokens=LONG, ignore_eos=True):
                began.release()

        ended = [
            asyncio.create_task(work)
            for work in (
                over_http(by_http[0], stream=True),
                over_http(by_http[0], stream=True, n=3),
                over_http(by_http[0], stream=False),
                over_grpc(by_grpc[0]),
            )
        ]
        others = [asyncio.create_task(over_http(by_http[1], stream=True)), asyncio.create_task(over_grpc(by_grpc[1]))]
        in_flight = gateway.output_processor.get_num_unfinished_requests
        while in_flight() < 8:
            assert not any(task.done() for task in [*ended, *others])
            await asyncio.sleep(0.01)
        for _ in range(40):
            await began.acquire()
        caller = await keys.guard.caller(lost)
        keys.store.revoke_key(caller.key_id)
        found = await asyncio.gather(*ended, return_exceptions=True)
        # The others' are still at it: what has ended was not done.
        assert not any(task.done() for task in others)
        streamed, several, whole, called = found
        for error in (streamed, several):
            assert isinstance(error, openai.APIError), error
            assert "was revoked or has expired before the answer was complete" in error.message
            assert error.body["code"] == 401  # type: ignore[index]
        assert isinstance(whole, openai.AuthenticationError), whole
        assert isinstance(called, Unauthenticated), called
        # Nothing of it is left in the engines.
        while in_flight() > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in by_http), *(client.close() for client in by_grpc))
