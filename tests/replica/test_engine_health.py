"""What is taken for a problem, and when; the process' end is in its own test (``tests/test_watchdog.py``)."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hycluster.engine import messages
from hycluster.engine.simulated import SimulatedEngine
from hycluster.replica import engine_health as health
from hycluster.replica.engine_health import EngineHealth
from hycluster.settings.pool import Health
from hycluster.settings.simulated import Simulated
from tests.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.timeout(120)


class Ended(queue.SimpleQueue[str]):
    """Reasons for which a process would have ended."""

    def __call__(self, why: str) -> None:
        self.put(why)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedEngine]:
    monkeypatch.setattr(health, "LOOK_EVERY_S", 0.02)
    engine = SimulatedEngine(Simulated(step_base_s=0.001))
    yield engine
    engine.shutdown()


@pytest.fixture
def ended() -> Ended:
    return Ended()


Watch = Any


@pytest.fixture
def watch(engine: SimulatedEngine, ended: Ended) -> Iterator[Watch]:
    watching = []

    def begin(**bounds: float) -> EngineHealth:
        watching.append(EngineHealth(engine, Health(**bounds), ended))
        watching[-1].start()
        return watching[-1]

    yield begin
    for each in watching:
        each.stop()


def ask(engine: SimulatedEngine, max_tokens: int = 5) -> None:
    request = messages.EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1],
        sampling_params=messages.SamplingParams(max_tokens=max_tokens),
        arrival_time=time.time(),
    )
    engine.add(1, messages.encode(request))


def test_a_hung_engine_ends_the_process(engine: SimulatedEngine, watch: Watch, ended: Ended) -> None:
    watching = watch(hung_after_s=0.3)
    engine.hang()
    ask(engine)
    assert "hung: no step for 0 s while it has work" in ended.get(timeout=PATIENCE_S)
    assert "hung" in (watching.problem() or "")


def test_an_idle_engine_that_is_broken_is_found(engine: SimulatedEngine, watch: Watch, ended: Ended) -> None:
    watching = watch(hung_after_s=0.2, probe_after_s=0.1)
    engine.hang()
    assert watching.problem() is None
    assert "hung" in ended.get(timeout=PATIENCE_S)


def test_a_dead_engine_ends_the_process(engine: SimulatedEngine, watch: Watch, ended: Ended) -> None:
    watch()
    engine.kill(RuntimeError("device lost"))
    assert ended.get(timeout=PATIENCE_S) == "engine died: device lost"


def test_a_sound_engine_is_left_alone(engine: SimulatedEngine, watch: Watch, ended: Ended) -> None:
    watch(hung_after_s=1, probe_after_s=0.05)
    ask(engine, max_tokens=400)
    time.sleep(1.5)
    assert ended.empty()


def test_only_an_idle_engine_is_probed(engine: SimulatedEngine, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[bool] = []

    def probe() -> None:
        probes.append(engine.last_step_age_s is None)
        SimulatedEngine.probe(engine)

    monkeypatch.setattr(engine, "probe", probe)
    ask(engine, max_tokens=300)
    # What its thread has not taken up yet is no work.
    eventually(lambda: engine.last_step_age_s is not None)
    watch(probe_after_s=0.1)
    eventually(lambda: len(probes) >= 3)
    assert all(probes)
    # Of the probes' tokens nobody hears.
    clients = set()
    engine.shutdown()
    while (message := engine.next_output()) is not None:
        clients.add(message[0])
    assert clients == {1}


def test_one_that_was_stopped_lets_its_engine_end(engine: SimulatedEngine, watch: Watch, ended: Ended) -> None:
    watch().stop()
    engine.kill(RuntimeError("late"))
    time.sleep(0.1)
    assert ended.empty()


def test_work_that_has_just_come_is_not_late(
    engine: SimulatedEngine, watch: Watch, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an engine says of its last step, which may have been long ago."""
    ages = iter([None, 999.0, None, 999.0, 999.0, None])
    monkeypatch.setattr(SimulatedEngine, "last_step_age_s", property(lambda _: next(ages, None)))
    watch(hung_after_s=5)
    time.sleep(0.5)
    assert next(ages, "used up") == "used up"
    assert ended.empty()
