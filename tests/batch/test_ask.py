"""Calls made again: engines that fail, and what is not asked again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from hycluster.batch import ask as module
from hycluster.batch.ask import Asker
from hycluster.batch.refusal import RowRefused
from hycluster.errors import JobFailed, KillsReplicas, Overloaded, ReplicaLost, RequestFailed, Unavailable
from hycluster.observe.timelines import Carried
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_BACKOFF_S", 0.004)


def failing(*errors: Exception) -> Callable[[], Awaitable[str]]:
    left = list(errors)

    async def call() -> str:
        if left:
            raise left.pop(0)
        return "fine"

    return call


async def test_what_replicas_die_of_is_refused() -> None:
    killer = KillsReplicas("this request was on 3 replicas in a row when they died")
    with pytest.raises(RowRefused, match="3 replicas in a row") as caught:
        await Asker(60)("x", failing(Unavailable("none"), killer))
    assert caught.value.reason == "Poison"


async def test_losses_blame_nobody() -> None:
    ask = Asker(60)
    assert await ask("x", failing(*[ReplicaLost("lost")] * 9)) == "fine"
    assert ask.retries == 9


async def test_a_rows_timeline_says_that_it_waits_to_be_asked_again() -> None:
    with Carried("row", "row", process="batch") as row:
        await Asker(60)("row", failing(Overloaded("full"), Unavailable("none")))
    assert [event.attributes for event in row.events if event.name == "waiting"] == [
        {"reason": "Overloaded"},
        {"reason": "Unavailable"},
    ]


async def test_retry_s_counts_from_the_last_answer_of_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    ask = Asker(retry_s=10)
    calls = 0

    async def long_and_lost() -> str:
        nonlocal now_s, calls
        calls += 1
        now_s += 100
        if calls == 1:
            # Longer than retry_s in the engine, then lost: the first failure starts the clock.
            raise ReplicaLost("lost")
        return "fine"

    assert await ask("long", long_and_lost) == "fine"
    calls = 0

    async def others_are_answered() -> str:
        nonlocal now_s, calls
        calls += 1
        now_s += 6
        await ask("other", failing())
        if calls < 5:
            raise Unavailable("not now")
        return "fine"

    assert await ask("slow", others_are_answered) == "fine"

    async def nobody_is() -> str:
        nonlocal now_s
        now_s += 6
        raise Unavailable("down")

    with pytest.raises(JobFailed, match=r"^row x: no engine could serve it for 10 s: down$"):
        await ask("x", nobody_is)


async def test_being_told_to_wait_is_a_sign_of_life() -> None:
    ask = Asker(retry_s=0)
    assert await ask("x", failing(*[Overloaded("later", retry_after_s=0.0001)] * 9)) == "fine"
    assert ask.retries == 0


async def test_a_request_that_engines_fail_while_they_answer_others_is_refused() -> None:
    ask = Asker(retry_s=60)
    failed = RequestFailed("the engine ended this request early (error)")

    async def always() -> str:
        raise failed

    asking = asyncio.create_task(ask("bad", always))
    await asyncio.sleep(0.03)
    assert not asking.done(), "an engine that fails all it is asked is not this row's fault"
    assert await ask("good", failing(failed, failed, failed)) == "fine"
    with pytest.raises(RowRefused, match=r"early \(error\), \d+ times$") as caught:
        await asking
    assert caught.value.reason == "Refused"


async def test_the_last_row_is_refused_once_engines_answer_a_request_that_is_nobodys() -> None:
    probes = 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        if probes < 3:
            raise RequestFailed("the engine ended this request early (error)")

    async def always() -> str:
        raise RequestFailed("the engine ended this request early (error)")

    with pytest.raises(RowRefused, match=r"early \(error\), 5 times$"):
        await Asker(60, probe=probe)("bad", always)
    assert probes == 3


async def test_rows_that_failed_together_come_back_one_by_one_and_not_before_they_were_told() -> None:
    ask, begun_s = Asker(retry_s=60), time.monotonic()
    back_s: list[float] = []

    def told_to_wait(retry_after_s: float | None) -> Callable[[], Awaitable[None]]:
        tries = iter([Overloaded("later", retry_after_s=retry_after_s), None])

        async def call() -> None:
            if error := next(tries):
                raise error
            back_s.append(time.monotonic() - begun_s)

        return call

    await asyncio.gather(*(ask("x", told_to_wait(0.4)) for _ in range(20)))
    assert min(back_s) >= 0.1
    assert max(back_s) - min(back_s) > 0.15


async def test_time_in_which_engines_were_busy_for_others_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, parked_until_s = 0.0, -1.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    ask = Asker(retry_s=10, alive_s=lambda: parked_until_s)
    calls = 0

    async def parked_and_lost() -> str:
        """Lost, an hour behind online requests on another replica, lost there too, and answered by the third."""
        nonlocal now_s, calls, parked_until_s
        calls += 1
        if calls == 2:
            now_s += 3600
            parked_until_s = now_s - 1
        if calls < 3:
            raise ReplicaLost("lost")
        return "fine"

    assert await ask("row", parked_and_lost) == "fine"

    async def gone() -> str:
        nonlocal now_s
        now_s += 6
        raise Unavailable("down")

    with pytest.raises(JobFailed, match="no engine could serve it for 10 s"):
        await ask("row", gone)


async def test_a_call_that_is_cancelled_is_not_made_again() -> None:
    calls = 0

    async def hangs() -> None:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()

    asking = asyncio.create_task(Asker(60)("x", hangs))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, PATIENCE_S)
    assert calls == 1
