"""Calls made again: engines that fail, replicas that die, and the row that kills them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from hycluster.batch import ask as module
from hycluster.batch.ask import Asker
from hycluster.batch.refusal import RowRefused
from hycluster.errors import JobFailed, Overloaded, ReplicaLost, RequestFailed, Unavailable


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_BACKOFF_S", 0.004)


class Replica:
    """One engine at a time; a poisonous row takes it along with all that is on it, then it is away for a moment."""

    def __init__(self, *poisons: str) -> None:
        self.poisons = poisons
        self.on_it: dict[str, asyncio.Future[str]] = {}
        self.deaths: list[set[str]] = []
        self.away = False

    async def answer(self, name: str) -> str:
        if self.away:
            raise Unavailable("no replica can serve now")
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_it[name] = reply
        asyncio.get_running_loop().call_later(0.002, self._finish, name, reply)
        answer: str = await reply
        return answer

    def _finish(self, name: str, reply: asyncio.Future[str]) -> None:
        if reply.done():
            return
        if name in self.poisons:
            self.die()
        else:
            del self.on_it[name]
            reply.set_result(name.upper())

    def die(self) -> None:
        self.deaths.append(set(self.on_it))
        for reply in self.on_it.values():
            reply.set_exception(ReplicaLost("the replica was lost"))
        self.on_it = {}
        self.away = True
        asyncio.get_running_loop().call_later(0.01, self.come_back)

    def come_back(self) -> None:
        self.away = False


async def ask_all(replica: Replica, names: list[str], ask: Asker, at_once: int = 16) -> dict[str, str]:
    slots = asyncio.Semaphore(at_once)

    async def one(name: str) -> str:
        async with slots:
            try:
                return await ask(name, lambda: replica.answer(name))
            except RowRefused as refused:
                return f"{refused.reason}: {refused.message}"

    answers = await asyncio.gather(*map(one, names))
    return dict(zip(names, answers, strict=True))


NAMES = [f"row{n}" for n in range(200)]
POISON = "Poison: 3 replicas in a row died while they had this row, the last with no other row of this process"


@pytest.mark.parametrize("poisons", [("row77",), ("row77", "row80"), ("row0", "row199")])
async def test_poison_is_found_and_innocents_are_cleared(poisons: tuple[str, ...]) -> None:
    replica = Replica(*poisons)
    answers = await ask_all(replica, NAMES, Asker(retry_s=60))
    assert answers == {name: POISON if name in poisons else name.upper() for name in NAMES}
    assert len(replica.deaths) <= 3 * len(poisons)
    assert [deaths for deaths in replica.deaths if len(deaths) == 1][-1] < set(NAMES)


async def test_ordinary_deaths_blame_nobody_and_close_no_gate() -> None:
    replica = Replica()
    loop = asyncio.get_running_loop()
    # Far enough apart that a row that was lost is answered before the next one.
    for number in range(4):
        loop.call_later(0.003 + 0.04 * number, replica.die)
    ask = Asker(retry_s=60)
    answers = await ask_all(replica, [f"row{n}" for n in range(600)], ask)
    assert answers == {f"row{n}": f"ROW{n}" for n in range(600)}
    assert ask.retries >= sum(map(len, replica.deaths)) > 4


def failing(*errors: Exception) -> Callable[[], Awaitable[str]]:
    left = list(errors)

    async def call() -> str:
        if left:
            raise left.pop(0)
        return "fine"

    return call


async def test_a_loss_between_two_that_found_no_replica_is_still_in_a_row() -> None:
    lost, none_there = ReplicaLost("lost"), Unavailable("none")
    with pytest.raises(RowRefused, match="3 replicas in a row"):
        await Asker(60)("x", failing(lost, none_there, lost, none_there, lost))
    assert await Asker(60)("x", failing(lost, none_there, lost, none_there)) == "fine"


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


async def test_a_call_that_is_cancelled_while_it_waits_to_be_alone_opens_the_gate() -> None:
    ask = Asker(retry_s=60)
    never = asyncio.Event()

    async def for_ever() -> str:
        await never.wait()
        return "fine"

    beside = asyncio.create_task(ask("beside", for_ever))
    losses = [ReplicaLost("1"), ReplicaLost("2")]
    lost = asyncio.create_task(ask("lost", failing(*losses)))
    async with asyncio.timeout(10):
        while ask._gate._open.is_set():  # noqa: ASYNC110 - tests look from outside
            await asyncio.sleep(0.001)
    late = asyncio.create_task(ask("late", failing()))
    await asyncio.sleep(0.02)
    assert not lost.done()
    assert not late.done()
    lost.cancel()
    assert await late == "fine"
    never.set()
    assert await beside == "fine"
