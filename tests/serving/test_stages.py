from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from hycluster.directory.directory import Overview
from hycluster.directory.starts import PROCESS, TURN, StageTime, StartingReplica
from hycluster.pool_health import StartTrouble
from hycluster.serving import stages
from hycluster.serving.ray_state import Deployment, Look
from hycluster.serving.stages import StageRow, StartDisplay, stage_rows
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.settings.settings import Settings

SETTINGS = Settings(models=(Model(name="big", source="/b", replicas=Replicas(min=2)), Model(name="small", source="/s")))
HEALTHY = {"replica-big": Deployment(2, "UPDATING", ""), "replica-small": Deployment(1, "UPDATING", "")}
LOOK = Look("c", HEALTHY, overview=Overview(1))
TROUBLE = StartTrouble(2, "EngineStartFailed", "no memory", 4.0)


def starting(*stages: tuple[str, float]) -> StartingReplica:
    return StartingReplica("a", tuple(StageTime(name, seconds) for name, seconds in stages))


def rows(look: Look, *, is_open: bool = False) -> list[StageRow]:
    return list(stage_rows(SETTINGS, look, is_open=is_open))


def test_from_the_first_process_to_the_open_ingress() -> None:
    big, small, ingress = rows(LOOK)
    assert big == StageRow("big", "begins", "process: Ray starts it")
    assert ingress == StageRow("ingress", "begins", "waits for a model")
    told = [
        rows(replace(LOOK, overview=Overview(1, {}, starting={"big": (starting((stage, 1.0)),)})))[0].label
        for stage in (PROCESS, TURN)
    ]
    assert told == ["process: is up", "waits before it tries again"]
    overview = Overview(
        1,
        {"big": 1, "small": 1},
        starting={"big": (starting(("weights", 2.0), ("engine", 5.0)), starting(("weights", 3.0)))},
    )
    big, small, ingress = rows(replace(LOOK, overview=overview))
    assert big == StageRow("big", "begins", "1 of 2 replicas serve; weights: found or made ready", "weights 3.0 s")
    assert small == StageRow("small", "done", "1 of 1 replicas serve")
    assert (ingress.state, ingress.label[:5]) == ("begins", "opens")
    assert rows(replace(LOOK, overview=overview), is_open=True)[-1] == StageRow("ingress", "done", "open")


def test_why_a_model_does_not_start() -> None:
    overview = Overview(1, {}, {"big": TROUBLE})
    message = "Deployment 'replica-small' has 1 replicas that have taken more than 30s to be scheduled."
    deployments = HEALTHY | {"replica-small": Deployment(1, "UPDATING", message)}
    big, small, _ = rows(replace(LOOK, overview=overview, deployments=deployments))
    assert big == StageRow("big", "failed", "2 starts of replicas failed: no memory; next try in 4 s")
    assert small == StageRow("small", "begins", f"waits for a place: {message}")


def test_a_model_that_sleeps_is_waited_for_by_nobody() -> None:
    model = Model(name="m", source="/m", replicas=Replicas(min=0, max=2))
    settings = Settings(models=(model,))
    assert next(iter(stage_rows(settings, Look("c", {"replica-m": Deployment(0, "HEALTHY", "")}), is_open=False))) == (
        StageRow("m", "done", "sleeps; a request wakes it")
    )
    overview = Overview(1, {"m": 0}, asleep=frozenset({"m"}))
    assert next(iter(stage_rows(settings, Look(overview=overview), is_open=False))).state == "done"


def test_nobody_answers_yet() -> None:
    assert [row.state for row in rows(Look())] == ["begins"] * 3


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def steps(display: StartDisplay, clock: Clock) -> None:
    """A start of a minute, looked at twice a second."""
    overviews: list[tuple[float, Overview, bool]] = [
        (0.5, Overview(1), False),
        (1.0, Overview(1), False),
        (3.0, Overview(1, starting={"big": (starting(("weights", 1.0)),)}), False),
        (9.0, Overview(1, {}, {"big": TROUBLE}), False),
        (14.0, Overview(1, starting={"big": (starting(("weights", 1.0), ("engine", 4.0)),)}), False),
        (15.0, Overview(1, starting={"big": (starting(("weights", 1.0), ("engine", 5.0)),)}), False),
        (60.0, Overview(1, {"big": 2, "small": 1}), True),
    ]
    for after_s, overview, is_open in overviews:
        clock.now_s = 50 + after_s
        display.update(replace(LOOK, overview=overview), is_open=is_open)


def test_lines_where_there_is_no_terminal() -> None:
    said: list[str] = []
    clock = Clock()
    with StartDisplay(SETTINGS, said.append, clock=clock, live=False) as display:
        steps(display, clock)
    assert [line for line in said if "small" not in line] == [
        "[500 ms] big: process: Ray starts it",
        "[500 ms] ingress: waits for a model",
        "[3.0 s] big: weights: found or made ready",
        # Why it failed is said by what tells of losses.
        "[14 s] big: engine: loads the weights and warms up",
        "[60 s] big: 2 of 2 replicas serve (weights 1.0 s, engine 5.0 s)",
        "[60 s] ingress: open",
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What a terminal has been sent, without its control sequences."""
    file = io.StringIO()
    screen = Console(file=file, width=120, force_terminal=True, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(stages, "console", lambda stderr: screen)
    return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_a_live_list_on_a_terminal(drawn: Callable[[], str]) -> None:
    said: list[str] = []
    clock = Clock()
    with StartDisplay(SETTINGS, said.append, clock=clock) as display:
        steps(display, clock)
        display.say("lost: [a node]")
        display.update(replace(LOOK, overview=Overview(1, {"big": 2, "small": 1})), is_open=True)
    assert not said
    text = drawn()
    # On a line of its own.
    assert "lost: [a node]" in text.splitlines()
    assert re.search(r"✗\s+big\s+2 starts of replicas failed: no memory; next try in 4 s", text)
    drawn_lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    assert drawn_lines[-3:] == [
        "✓ big 2 of 2 replicas serve after 60 s weights 1.0 s, engine 5.0 s",
        "✓ small 1 of 1 replicas serve after 60 s",
        "✓ ingress open after 60 s",
    ]
