"""A line for each loss and each return, and no more lines than one reads."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from hycluster.directory.directory import Overview
from hycluster.pool_health import StartTrouble
from hycluster.serving.losses import LINES_A_MINUTE, SILENT_S, Losses
from hycluster.serving.ray_state import CONTROLLER, DIRECTORY, Deployment, Look, ServiceProcess

NAMES = {"replica-m": "replica of m", "ingress": "ingress"}
FINE = {"replica-m": Deployment(2, "HEALTHY", ""), "ingress": Deployment(1, "HEALTHY", "")}
# No process has this pid.
GONE = 1 << 22


def process(name: str, deployment: str = "replica-m", pid: int = GONE, node: str = "here") -> ServiceProcess:
    return ServiceProcess(deployment, name, pid, node, f"SERVE_REPLICA::{name}")


def look(*processes: ServiceProcess, **changes: object) -> Look:
    seen = Look("c1", FINE, {p.id: p for p in processes}, Overview(77), {"n1": "10.0.0.1"})
    return replace(seen, **changes)  # type: ignore[arg-type]


class Told:
    """Losses, their clock and what they said, the time cut off."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.losses = Losses(NAMES, frozenset({"here"}), lambda: self.now_s)

    def see(self, seen: Look, after_s: float = 1) -> list[str]:
        self.now_s += after_s
        return [line.split(" ", 2)[2] for line in self.losses.compare(seen)]


@pytest.fixture
def told() -> Told:
    return Told()


A, B, C = process("a"), process("b"), process("c")


def test_what_a_new_controller_does_not_know_yet_stays_known(told: Told) -> None:
    told.see(look(A, B))
    unknown = replace(A, pid=None, node="", actor="")
    assert told.see(look(unknown, B)) == []
    assert told.see(look(B)) == [f"lost: replica of m (a, pid {GONE} on here); 1 of 2 there"]


def test_a_start_is_no_loss(told: Told) -> None:
    assert told.see(look()) == []
    assert told.see(look(A)) == []
    assert told.see(look(A, B)) == []


def test_a_loss_and_the_return(told: Told) -> None:
    told.see(look(A, B))
    assert told.see(look(B)) == [f"lost: replica of m (a, pid {GONE} on here); 1 of 2 there"]
    assert told.see(look(B)) == []
    assert told.see(look(B, C), after_s=20) == [f"back: replica of m (c, pid {GONE} on here) after 21 s; 2 of 2 there"]


def test_what_is_asked_to_go_is_not_lost(told: Told) -> None:
    told.losses.started()
    told.see(look(A, B))
    shrinking = FINE | {"replica-m": Deployment(1, "DOWNSCALING", "")}
    assert told.see(look(B, deployments=shrinking)) == [f"stopped: replica of m (a, pid {GONE} on here); 1 of 1 there"]
    assert told.see(look(B, C)) == [f"new: replica of m (c, pid {GONE} on here); 2 of 2 there"]


def test_one_that_the_controller_forgets_for_a_moment_is_not_lost(told: Told) -> None:
    there = process("a", pid=os.getpid())
    told.see(look(there, B))
    assert told.see(look(B)) == []
    assert told.see(look(there, B)) == []
    # Twice is no moment.
    assert told.see(look(B)) == []
    assert told.see(look(B)) == [f"lost: replica of m (a, pid {os.getpid()} on here); 1 of 2 there"]


def test_controller_and_directory(told: Told) -> None:
    told.see(look(A, B))
    assert told.see(look(controller=None, deployments=None, processes={})) == [
        "lost: Serve's controller; what runs serves on, nothing is replaced"
    ]
    # It has come back, and does not know what runs yet.
    assert told.see(look(controller="c2", deployments=None, processes={}), after_s=2) == [
        "back: Serve's controller after 2 s"
    ]
    assert told.see(look(A, B, controller="c2")) == []
    assert told.see(look(A, B, controller="c2", overview=Overview(78))) == [
        "lost: the directory (pid 77); ingress processes go on with what they know",
        "back: the directory (pid 78) after 0 s",
    ]


def test_who_is_slow_is_not_lost(told: Told) -> None:
    late = frozenset({CONTROLLER, DIRECTORY})
    silent = look(controller=None, deployments=None, processes={}, overview=None, late=late)
    told.see(look(A, B))
    assert told.see(silent) == []
    assert told.see(silent, after_s=12) == []
    assert told.see(look(A, B)) == []
    # Another one answers in the end: it was lost when it fell silent.
    assert told.see(silent) == []
    assert told.see(look(A, B, controller="c2"), after_s=5) == [
        "lost: Serve's controller; what runs serves on, nothing is replaced",
        "back: Serve's controller after 5 s",
    ]
    # Silent for so long, it is as good as gone.
    told.see(silent)
    assert told.see(silent, after_s=SILENT_S) == [
        "lost: Serve's controller; what runs serves on, nothing is replaced",
        "lost: the directory (pid 77); ingress processes go on with what they know",
    ]
    assert told.see(look(A, B, controller="c2"), after_s=10) == [
        "back: Serve's controller after 30 s",
        "back: the directory (pid 77) after 30 s",
    ]


def test_nodes(told: Told) -> None:
    told.see(look())
    assert told.see(look(nodes={"n1": "10.0.0.1", "n2": "10.0.0.2"})) == ["new: node 10.0.0.2 (n2); 2 there"]
    assert told.see(look(nodes={"n2": "10.0.0.2"})) == ["lost: node 10.0.0.1 (n1); 1 there"]


def test_a_crash_loop_is_summed_up(told: Told) -> None:
    told.see(look(A, B))
    lines = []
    for number in range(60):
        lines += told.see(look(B, *([process(f"x{number}")] if number % 2 else [])), after_s=2)
    assert len(lines) == LINES_A_MINUTE + 1
    assert lines[-1].startswith("again and again: replica of m: ")
    # Whoever has calmed down is told of as before.
    told.see(look(B, C), after_s=200)
    told.see(look(B, C), after_s=200)
    assert told.see(look(B))[0].startswith("lost: replica of m (c")


def test_starts_that_fail_are_told_as_often_as_they_double(told: Told) -> None:
    lines = []
    for failures in range(1, 20):
        # Figures in a reason make no new one.
        trouble = StartTrouble(failures, "EngineStartFailed", f"{failures} GiB are not there", 2.0)
        lines += told.see(look(overview=Overview(77, {}, {"m": trouble})), after_s=30)
    assert [line.split(": ")[2] for line in lines] == [
        "a replica did not start", *(f"{n} starts of replicas failed" for n in (2, 4, 8, 16))
    ]  # fmt: skip
    assert lines[0] == "not started: model m: a replica did not start: 1 GiB are not there; next try in 2 s"
    assert told.see(look(overview=Overview(77, {"m": 1}, {}))) == ["started: model m"]


def test_what_only_serve_knows(told: Told) -> None:
    message = "has 1 replicas that have taken more than 30s to be scheduled.\nResources required: {'CPU': 4}"
    waiting = FINE | {"replica-m": Deployment(2, "UPDATING", message)}
    assert told.see(look(deployments=waiting)) == [f"Serve says of replica of m: {' '.join(message.split())}"]
    assert told.see(look(deployments=waiting)) == []
