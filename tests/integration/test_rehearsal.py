"""The dev overlay's cluster with its Redis, on nodes of its own: controller, head, door node, engine node lost in turn.

All is started as KubeRay starts it (``tests/rehearsal.py``), under the load of callers at both doors over both
protocols, on vLLM with a tiny model. What is spare fails nobody: every call at a door that lives is answered whole, and
the processes that were not struck are the same ones afterwards.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from bench import tiny_llama
from tests.nodes import Node, missing, network, wait_for
from tests.rehearsal import Load, Rehearsal, redis_missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "tiny"
# All begins at once on few CPUs: a door takes half a minute of one, an engine as much.
START_S = 300.0
AWAY_S = 12.0
# What comes after the last thing that a loss brings about; there, calls have been cut before.
AFTER_S = 8.0
LONG_TOKENS = 1200


@pytest.fixture(scope="module")
def rehearsal() -> Iterator[Rehearsal]:
    if why := missing() or redis_missing():
        pytest.skip(why)
    with network() as net:
        model = {
            "name": MODEL,
            "source": str(tiny_llama.make(net.folder / "model")),
            "engine": {"max_model_len": 2048, "max_num_seqs": 32},
            "hardware": {"cpus": 1, "kv_cache_gib": 0.25},
            "replicas": {"min": 2},
        }
        cluster = Rehearsal(net, model, {"drain_timeout_s": 10})
        try:
            cluster.start()
            wait_for(cluster.running, START_S, "Serve runs all", every_s=0.5)
            yield cluster
        except BaseException:
            print(cluster.state(), net.tails(), sep="\n")
            raise


@pytest.fixture(autouse=True)
def told(rehearsal: Rehearsal, request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failure is explained by, shown with it."""
    failed = request.session.testsfailed
    began = time.monotonic()
    yield
    print(f"{request.node.name}: {time.monotonic() - began:.0f} s")
    if request.session.testsfailed > failed:
        print(rehearsal.state(), rehearsal.network.tails(), sep="\n")


def load_on(rehearsal: Rehearsal, long_tokens: int = LONG_TOKENS) -> Load:
    doors = {name: node.address for name, node in rehearsal.network.nodes.items() if name.startswith("door")}
    return Load(MODEL, doors, long_tokens=long_tokens)


def title(rehearsal: Rehearsal, role: str) -> Node:
    """The first node of a role."""
    return next(node for name, node in sorted(rehearsal.network.nodes.items()) if name.startswith(role))


def nobody_noticed(load: Load) -> None:
    print(load.told())
    assert [call for call in load.calls if call.error] == []
    # Of ten a second, whatever else this machine does.
    assert len(load.calls) > 50


def test_it_is_as_the_overlay_says(rehearsal: Rehearsal) -> None:
    running = rehearsal.processes()
    assert [len(pids) for name, pids in running.items() if name.startswith("door")] == [1, 1]
    assert [len(pids) for name, pids in running.items() if name.startswith("engine")] == [1, 1]
    load = load_on(rehearsal)
    with load.going():
        time.sleep(AFTER_S)
    nobody_noticed(load)


def test_the_controller_is_killed(rehearsal: Rehearsal) -> None:
    before = rehearsal.processes()
    load = load_on(rehearsal)
    with load.going():
        (pid,) = rehearsal.controllers()
        os.kill(pid, signal.SIGKILL)
        back_s = wait_for(lambda: rehearsal.controllers() - {pid}, 60, "a new controller", every_s=0.1)
        settled_s = wait_for(rehearsal.running, 120, "Serve runs all again")
        time.sleep(AFTER_S)
    print(f"controller: new after {back_s:.1f} s, Serve says all is well {settled_s:.1f} s later")
    nobody_noticed(load)
    assert rehearsal.processes() == before


def test_the_head_is_lost_and_comes_back_elsewhere(rehearsal: Rehearsal) -> None:
    before = rehearsal.processes()
    load = load_on(rehearsal)
    with load.going():
        rehearsal.network.nodes["head"].kill()
        time.sleep(AWAY_S)
        rehearsal.start_head()
        back_s = wait_for(rehearsal.running, 180, "Serve runs all again")
        time.sleep(AFTER_S)
    print(f"head: Serve says all is well {back_s:.1f} s after the new pod's start")
    nobody_noticed(load)
    assert rehearsal.processes() == before


def test_an_engine_node_is_lost(rehearsal: Rehearsal) -> None:
    """After the head: its successor places what is missing."""
    lost, before = title(rehearsal, "engine"), rehearsal.processes()
    load = load_on(rehearsal)
    with load.going():
        lost.remove()
        rehearsal.start_worker("engines", "engine-c", cpus=1)
        replaced_s = wait_for(lambda: len(rehearsal.processes()["engine-c"]) == 1, START_S, "an engine on the new node")
        wait_for(rehearsal.running, START_S, "Serve runs all again", every_s=0.5)
    print(f"engine node: a process {replaced_s:.1f} s after the new pod's start")
    nobody_noticed(load)
    after = rehearsal.processes()
    assert {name: after.get(name) for name in before if name != lost.name} == {
        name: pids for name, pids in before.items() if name != lost.name
    }


def test_a_door_node_falls_silent(rehearsal: Rehearsal) -> None:
    lost, before = title(rehearsal, "door"), rehearsal.processes()
    load = load_on(rehearsal)
    with load.going():
        lost.cut()
        cut = time.monotonic()
        # Kubernetes takes minutes; the new pod does not wait for that here.
        node = rehearsal.start_worker("doors", "door-c")
        wait_for(lambda: rehearsal.processes()[node.name], START_S, "a door is placed on the new node")
        placed_s = time.monotonic() - cut
        wait_for(lambda: rehearsal.able(node), START_S, "the new node's door answers")
        able_s = time.monotonic() - cut
        lost.remove()
    print(f"door node: successor placed {placed_s:.1f} s after the loss, able after {able_s:.1f} s")
    print(load.told())
    assert load.failed() == load.failed(lost.name) != []
    after = rehearsal.processes()
    assert {name: after.get(name) for name in before if name != lost.name} == {
        name: pids for name, pids in before.items() if name != lost.name
    }
