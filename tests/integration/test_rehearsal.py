"""The dev overlay's cluster with its Redis, on nodes of its own: controller, head, ingress node, engine node lost in
turn.

All is started as KubeRay starts it (``tests/rehearsal.py``), under the load of callers at both ingresses over both
protocols, on vLLM with a tiny model. What is spare fails nobody: every call at an ingress process that lives is
answered whole, and the processes that were not hit are the same ones afterwards.

In the environment, ``REHEARSAL=all`` takes what a change need not wait for as well, ``REHEARSAL_MODEL=SOURCE`` another
model, ``REHEARSAL_ENV='{"RAY_x": "1"}'`` gives Ray's nodes variables that the manifests do not, and
``REHEARSAL_LOGS=FOLDER`` keeps what they wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench import tiny_llama
from tests.nodes import Node, missing, network, wait_for
from tests.ray_node_forks import RAYLET
from tests.rehearsal import REDIS, Load, Rehearsal, redis_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.machine("six nodes' processes must start and answer within Ray's and Redis' own limits"),
]
longer = pytest.mark.skipif(os.environ.get("REHEARSAL") != "all", reason="takes minutes; REHEARSAL=all runs it")

# All begins at once on few CPUs: an ingress process takes half a minute of one, an engine as much.
START_S = 300.0
AWAY_S = 12.0
# What comes after the last thing that a loss brings about; there, calls have been cut before.
AFTER_S = 8.0
SOURCE = os.environ.get("REHEARSAL_MODEL", "tiny")
# Some seconds each.
LONG_TOKENS = 600 if SOURCE == "tiny" else 200


@pytest.fixture(scope="module")
def rehearsal() -> Iterator[Rehearsal]:
    if why := missing() or redis_missing():
        pytest.skip(why)
    with network() as net:
        tiny = SOURCE == "tiny"
        model = {
            "name": "rehearsed",
            "source": str(tiny_llama.make(net.folder / "model")) if tiny else SOURCE,
            "engine": {"max_model_len": 2048, "max_num_seqs": 32},
            "hardware": {"cpus": 1, "kv_cache_gib": 0.25 if tiny else 1},
            "replicas": {"min": 2},
        }
        prepared = None if tiny else Path("~/.cache/hycluster/models").expanduser()
        env = json.loads(os.environ.get("REHEARSAL_ENV", "{}"))
        cluster = Rehearsal(net, model, {"drain_timeout_s": 10}, env, prepared)
        try:
            cluster.start()
            print(
                f"rehearsal: all runs after {wait_for(cluster.running, START_S, 'Serve runs all', every_s=0.5):.0f} s"
            )
            yield cluster
        except BaseException:
            print(cluster.state(), net.tails(), sep="\n")
            raise
        finally:
            if kept := os.environ.get("REHEARSAL_LOGS"):
                shutil.copytree(net.folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sock*", "model*"))


@pytest.fixture(autouse=True)
def told(rehearsal: Rehearsal, request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failure is explained by, shown with it."""
    failed, began = request.session.testsfailed, time.monotonic()
    yield
    print(f"rehearsal: {request.node.name}: {time.monotonic() - began:.0f} s in all")
    if request.session.testsfailed > failed:
        print(rehearsal.state(), rehearsal.network.tails(), sep="\n")


def load_on(rehearsal: Rehearsal) -> Load:
    ingresses = {name: node.address for name, node in rehearsal.network.nodes.items() if name.startswith("ingress")}
    return Load(rehearsal.model, ingresses, long_tokens=LONG_TOKENS)


def first(rehearsal: Rehearsal, role: str) -> Node:
    """The oldest node of a role."""
    return next(node for name, node in rehearsal.network.nodes.items() if name.startswith(role))


def nobody_noticed(load: Load, but: str = "") -> None:
    """Whoever called another ingress process than this one."""
    print(load.told())
    assert [call for call in load.calls if call.error and call.ingress != but] == []
    # Of ten a second, whatever else this machine does.
    assert sum(call.ingress != but for call in load.calls) > 50


def same(before: dict[str, set[int]], rehearsal: Rehearsal, but: str = "") -> None:
    """All nodes but one have the processes that they had."""
    after = rehearsal.processes()
    assert {name: after.get(name) for name in before if name != but} == {
        name: pids for name, pids in before.items() if name != but
    }


def test_it_is_as_the_overlay_says(rehearsal: Rehearsal) -> None:
    assert {name: len(pids) for name, pids in rehearsal.processes().items()} == {
        "ingress-1": 1, "ingress-2": 1, "engine-1": 1, "engine-2": 1,
    }  # fmt: skip
    load = load_on(rehearsal)
    with load.going():
        time.sleep(AFTER_S)
    nobody_noticed(load)


def test_who_needs_vllm_is_forked(rehearsal: Rehearsal) -> None:
    for pid in set().union(*rehearsal.processes().values()):
        process = psutil.Process(pid)
        assert psutil.Process(process.ppid()).name() == "raylet"
        # What a process was started with is its forks' too, whatever they have changed since.
        assert process.environ().items() >= RAYLET.items()


def test_the_controller_is_killed(rehearsal: Rehearsal) -> None:
    before, load = rehearsal.processes(), load_on(rehearsal)
    with load.going():
        (pid,) = rehearsal.controllers()
        os.kill(pid, signal.SIGKILL)
        new_s = wait_for(lambda: rehearsal.controllers() - {pid}, 60, "a new controller", every_s=0.1)
        well_s = wait_for(rehearsal.running, 120, "Serve runs all again")
        time.sleep(AFTER_S)
    print(f"controller: a new one after {new_s:.1f} s, says that all is well {well_s:.1f} s later")
    nobody_noticed(load)
    same(before, rehearsal)


def test_the_head_is_lost_and_comes_back_elsewhere(rehearsal: Rehearsal) -> None:
    before, load = rehearsal.processes(), load_on(rehearsal)
    with load.going():
        rehearsal.network.nodes["head"].kill()
        time.sleep(AWAY_S)
        rehearsal.await_start(rehearsal.start_head())
        well_s = wait_for(rehearsal.running, 180, "Serve runs all again")
        time.sleep(AFTER_S)
    print(f"head: Serve says that all is well {well_s:.1f} s after the new pod's start")
    nobody_noticed(load)
    same(before, rehearsal)


@longer
def test_the_head_falls_silent_and_comes_back_elsewhere(rehearsal: Rehearsal) -> None:
    before, load = rehearsal.processes(), load_on(rehearsal)
    with load.going():
        rehearsal.network.nodes["head"].cut()
        time.sleep(AWAY_S)
        rehearsal.await_start(rehearsal.start_head())
        well_s = wait_for(rehearsal.running, 400, "Serve runs all again")
        time.sleep(AFTER_S)
    print(f"silent head: Serve says that all is well {well_s:.1f} s after the new pod's start")
    nobody_noticed(load)
    same(before, rehearsal)


def engine_node_lost(rehearsal: Rehearsal, *, silently: bool) -> None:
    """And its successor, which is there at once, gets an engine."""
    lost, before, load = first(rehearsal, "engine"), rehearsal.processes(), load_on(rehearsal)
    with load.going():
        if silently:
            lost.cut()
        else:
            lost.kill()
        at = time.monotonic()
        new = rehearsal.start_worker("engines")
        rehearsal.await_start(new)
        wait_for(lambda: rehearsal.processes()[new.name], START_S, "an engine is placed on the new node")
        placed_s = time.monotonic() - at
        wait_for(rehearsal.running, START_S, "Serve runs all again", every_s=0.5)
        well_s = time.monotonic() - at
        lost.remove()
    print(
        f"engine node: successor placed {placed_s:.1f} s after the loss, Serve says that all is well at {well_s:.1f} s"
    )
    nobody_noticed(load)
    same(before, rehearsal, but=lost.name)


def ingress_node_lost(rehearsal: Rehearsal, *, silently: bool) -> None:
    """Its callers notice, nobody else; an ingress process comes to its successor."""
    lost, before, load = first(rehearsal, "ingress"), rehearsal.processes(), load_on(rehearsal)
    with load.going():
        if silently:
            lost.cut()
            load.silent = lost.name
        else:
            lost.kill()
        at = time.monotonic()
        new = rehearsal.start_worker("ingress")
        rehearsal.await_start(new)
        wait_for(lambda: rehearsal.processes()[new.name], START_S, "an ingress process is placed on the new node")
        placed_s = time.monotonic() - at
        wait_for(lambda: rehearsal.able(new), START_S, "the new node's ingress process answers")
        able_s = time.monotonic() - at
        lost.remove()
    wait_for(rehearsal.running, START_S, "Serve runs all again", every_s=0.5)
    print(f"ingress node: successor placed {placed_s:.1f} s after the loss, answers after {able_s:.1f} s")
    nobody_noticed(load, but=lost.name)
    assert load.failed(lost.name)
    same(before, rehearsal, but=lost.name)


def test_an_engine_node_is_killed(rehearsal: Rehearsal) -> None:
    engine_node_lost(rehearsal, silently=False)


def test_an_ingress_process_node_falls_silent(rehearsal: Rehearsal) -> None:
    ingress_node_lost(rehearsal, silently=True)


@longer
def test_an_engine_node_falls_silent(rehearsal: Rehearsal) -> None:
    engine_node_lost(rehearsal, silently=True)


@longer
def test_an_ingress_process_node_is_killed(rehearsal: Rehearsal) -> None:
    ingress_node_lost(rehearsal, silently=False)


@longer
def test_redis_is_lost_and_comes_back(rehearsal: Rehearsal) -> None:
    """GCS ends without it, and so does the head; KubeRay's new one waits for Redis."""
    before, load = rehearsal.processes(), load_on(rehearsal)
    with load.going():
        rehearsal.network.nodes[REDIS].kill()
        head = rehearsal.network.nodes["head"]
        ended_s = wait_for(lambda: not head.running, 120, "the head ends")
        rehearsal.start_head()
        time.sleep(AWAY_S)
        rehearsal.start_redis()
        well_s = wait_for(rehearsal.running, 300, "Serve runs all again")
        time.sleep(AFTER_S)
    print(
        f"Redis: the head ended after {ended_s:.1f} s; Serve says that all is well {well_s:.1f} s after Redis is back"
    )
    nobody_noticed(load)
    same(before, rehearsal)


@longer
def test_settings_change(rehearsal: Rehearsal) -> None:
    before, load = rehearsal.processes(), load_on(rehearsal)
    with load.going():
        rehearsal.settings["drain_timeout_s"] = 20
        rehearsal.serve(60)
        old = set().union(*before.values())
        changed_s = wait_for(
            lambda: rehearsal.running() and not old & set().union(*rehearsal.processes().values()),
            START_S * 2,
            "everything is replaced",
            every_s=1,
        )
    print(f"settings: everything is replaced after {changed_s:.0f} s")
    nobody_noticed(load)
