from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from hycluster.directory.faults import ReplicaFault
from hycluster.state.cluster_state import ClusterState
from hycluster.state.terminal import shown_state
from hycluster.state.traffic_state import traffic_state
from hycluster.traffic import ModelTraffic
from tests.state.made import BIG, NOW, made_state


def shown(state: ClusterState, width: int = 160) -> str:
    file = io.StringIO()
    Console(file=file, width=width, markup=False, emoji=False, highlight=False).print(shown_state(state))
    return file.getvalue()


def test_all_of_it() -> None:
    text = shown(made_state())
    for part in (
        "degraded  1 of 2 pools well",
        "0f1e2d3c on 10.0.0.15",
        "63 of 64 running, 3 waiting",
        "replica 77aa88bb starts: weights 41 s, engine 13 s",
        "CUDA out of memory: 80 GiB asked, 12 GiB free; next try in 8 s",
        "98.99 % answered (to be 99.5 %), 18 failed, 18 found no replica, 36 shed, 3 left",
        "batch rows at ingresses  600 answered, 0 failed, 30 told to come back, 0 left, 60,000 tokens out",
        "31,262 of 48,000 requests, 12 failed",
        "waits for online traffic",
        "summaries-s3://corpus/out",
        "24, wants more",
        "lost: has said nothing for 10 s",
        "▇",
    ):
        assert part in text, part


def test_nobody_asked_and_nothing_went_wrong() -> None:
    quiet = replace(made_state(), traffic=traffic_state(ModelTraffic(), NOW, 0.995), batches=None, faults=(), pools=())
    text = shown(quiet)
    assert "last hour: no requests" in text
    assert "faults" not in text


def test_the_terminal_obeys_nothing_of_it() -> None:
    fault = ReplicaFault(NOW, BIG, "\x1b]0;title\x07", "[red]not markup[/red] \x1b[31mred \u202e")
    state = made_state()
    evil = replace(state.pools[0], model="\x1b[2Jgone", why="\x1b[31m")
    text = shown(replace(state, faults=(fault,), pools=(evil,)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]not markup[/red]" in text
