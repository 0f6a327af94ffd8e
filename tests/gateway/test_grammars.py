"""Schemas, regexes and grammars that cost too much, in the process that is there for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import pytest_asyncio

from hycluster.errors import InvalidInput, Overloaded
from hycluster.gateway import grammars
from hycluster.gateway.grammars import KINDS, GrammarCheck
from hycluster.settings.load import Admission
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)

ORDINARY = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 50}, "age": {"type": "integer"}}}
# Seconds to xgrammar, which looks for the properties one by one.
MANY_PATTERNS = {"properties": {f"k{n}": {"type": "string", "pattern": f"^a{{1,{n + 1}}}$"} for n in range(1000)}}
# Gigabytes to llguidance, which writes the items out.
MANY_ITEMS = {"type": "array", "minItems": 10**9}
TAGGED = {"structures": [{"begin": "<f>", "schema": MANY_ITEMS, "end": "</f>"}], "triggers": ["<f"]}


def asked(**only: Any) -> Any:
    """vLLM's ``StructuredOutputsParams``, as far as they are looked at."""
    return SimpleNamespace(**(dict.fromkeys(KINDS) | only))


@pytest_asyncio.fixture
async def check() -> AsyncIterator[GrammarCheck]:
    """With a bound on counts that lets all of them through."""
    made = GrammarCheck(Admission(max_grammar_repeats=10**12, grammar_timeout_s=0.5))
    yield made
    made.close()


@contextlib.contextmanager
def no_more_memory_than(mib: int) -> Iterator[None]:
    before = psutil.Process().memory_info().rss
    yield
    assert (psutil.Process().memory_info().rss - before) >> 20 < mib


@pytest.mark.parametrize(
    "costly", [{"json": MANY_PATTERNS}, {"json": MANY_ITEMS}, {"structural_tag": json.dumps(TAGGED)}]
)
async def test_what_costs_too_much_ends_its_own_process(check: GrammarCheck, costly: dict[str, Any]) -> None:
    took_s = []
    with no_more_memory_than(50):
        for _ in range(5):
            begun_s = time.monotonic()
            with pytest.raises(InvalidInput, match=r"takes more to compile than is allowed, 0\.5 s of"):
                await check.check(asked(**costly))
            took_s.append(time.monotonic() - begun_s)
    # It is remembered.
    assert min(took_s) < 0.1
    await check.check(asked(json=ORDINARY))


async def test_memory_is_bounded_whatever_time_there_is() -> None:
    check = GrammarCheck(Admission(max_grammar_repeats=10**12, grammar_timeout_s=60, grammar_memory_mib=64))
    most = 0

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            for worker in list(check._workers):
                with contextlib.suppress(psutil.Error):
                    most = max(most, psutil.Process(worker._process.pid).memory_info().rss)

    ended = threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(InvalidInput, match="64 MiB"):
            await check.check(asked(json=MANY_ITEMS))
        await check.check(asked(json=ORDINARY))
    finally:
        ended.set()
        watching.join()
        check.close()
    assert 0 < most >> 20 < 250


@pytest.mark.parametrize(
    "ordinary",
    [
        {"json": ORDINARY},
        {"json": json.dumps(ORDINARY)},
        {"json": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}}},
        {"regex": "[a-z]{1,20}"},
        {"choice": ["yes", 'a "no"']},
        {"grammar": 'root ::= "a" | "b"'},
        {"grammar": 'start: "a" "b"'},
        {"structural_tag": json.dumps(TAGGED).replace("1000000000", "3")},
        # vLLM says what is wrong with them.
        {"json": {"type": "no such type"}},
        {"json": "{"},
        {"regex": "("},
        {"regex": "\ud800"},
        {"grammar": "nonsense"},
        {"structural_tag": "{}"},
        {"structural_tag": "7"},
        {"regex": "(" * 30_000 + ")" * 30_000},
        {},
    ],
)
async def test_what_costs_little_goes_on(shared: GrammarCheck, ordinary: dict[str, Any]) -> None:
    went_on: list[str] = []
    await shared.check(asked(**ordinary), lambda: went_on.append(threading.current_thread().name))
    assert len(went_on) == 1
    assert not ordinary or went_on[0].startswith("grammar here")


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarCheck]:
    made = GrammarCheck(Admission())
    yield made
    made.close()


async def test_an_ordinary_one_takes_milliseconds(shared: GrammarCheck) -> None:
    await shared.check(asked(json=ORDINARY))
    took = []
    for number in range(20):
        begun = time.monotonic()
        await shared.check(asked(json=ORDINARY | {"title": str(number)}))
        took.append(time.monotonic() - begun)
    assert min(took) < 0.05


async def test_costly_ones_hold_up_neither_the_loop_nor_what_is_known(check: GrammarCheck) -> None:
    await check.check(asked(json=ORDINARY))
    costly = [asyncio.create_task(check.check(asked(json=MANY_ITEMS | {"title": str(n)}))) for n in range(2)]
    lags = []
    while not all(one.done() for one in costly):
        before = time.monotonic()
        await check.check(asked(json=ORDINARY))
        await asyncio.sleep(0.01)
        lags.append(time.monotonic() - before)
    # Each of them takes half a second of its own process, and the loop would turn but a few times.
    assert len(lags) > 10
    assert sorted(lags)[len(lags) // 2] < 0.2
    assert all(isinstance(error, InvalidInput) for error in await asyncio.gather(*costly, return_exceptions=True))


async def test_too_many_at_once(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_WAITING", 3)
    results = await asyncio.gather(
        *(check.check(asked(json=ORDINARY | {"title": str(n)})) for n in range(5)), return_exceptions=True
    )
    assert [type(one) for one in results] == [type(None)] * 3 + [Overloaded] * 2


async def test_one_who_ends_processes_is_not_blamed_on_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of two threads the other one may be asked, with a process of its own.
    monkeypatch.setattr(grammars, "WORKERS", 1)
    with contextlib.closing(GrammarCheck(Admission(max_grammar_repeats=10**12, grammar_timeout_s=0.5))) as check:
        await check.check(asked(json=ORDINARY))
        (worker,) = check._workers
        worker._process.send_signal(signal.SIGSTOP)
        asking = asyncio.create_task(check.check(asked(json=ORDINARY | {"title": "other"})))
        await asyncio.sleep(0.1)
        worker.kill()
        await asking
        assert len(check._workers) == 1


async def test_nothing_is_left(check: GrammarCheck) -> None:
    await check.check(asked(json=ORDINARY))
    asking = asyncio.create_task(check.check(asked(json=MANY_ITEMS)))
    await asyncio.sleep(0.1)
    pids = [worker._process.pid for worker in check._workers]
    check.close()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert pids
