from __future__ import annotations

import inspect
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from hycluster.chaos.schedule import Where
from hycluster.chaos.targets import Hand, TargetProcess, Targets
from tests.waiting import PATIENCE_S

# A process and, below it, one that is titled like a tensor worker and one that is not.
FAMILY = """
import subprocess, sys, time
sleep = "import time; time.sleep(60)"
for title in ("VLLM::Worker_TP1", "python"):
    subprocess.Popen([title, "-c", sleep], executable=sys.executable)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def family() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = psutil.Process(process.pid)
        try:
            yield found
        finally:
            for member in [found, *found.children()] if found.is_running() else []:
                member.kill()


def comes_to(pid: int, *, stopped: bool) -> bool:
    """Whether it stops, or runs on, soon."""
    end = time.monotonic() + PATIENCE_S
    while (psutil.Process(pid).status() == psutil.STATUS_STOPPED) is not stopped:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_signals_reach_the_process_that_was_found(family: psutil.Process) -> None:
    hand = Hand("node")
    found = hand.processes(family.pid, "replica")
    # The other child is none of ours.
    assert [process.role for process in found] == ["replica", "worker"]
    process, worker = found
    assert psutil.Process(worker.pid).ppid() == process.pid == family.pid
    assert hand.send(worker, signal.SIGSTOP)
    assert comes_to(worker.pid, stopped=True)
    assert hand.send(worker, signal.SIGCONT)
    assert comes_to(worker.pid, stopped=False)
    begun = time.monotonic()
    assert hand.send(process, signal.SIGSTOP, 0.1)
    assert time.monotonic() - begun >= 0.1
    assert comes_to(process.pid, stopped=False)


def test_another_process_of_the_same_number_is_left_alone(family: psutil.Process) -> None:
    hand = Hand("node")
    former = TargetProcess("node", family.pid, family.create_time() - 100, "replica")
    assert not hand.send(former, signal.SIGKILL)
    assert family.is_running()
    gone = TargetProcess("node", 2**22 + 1, 0.0, "replica")
    assert not hand.send(gone, signal.SIGKILL)
    assert hand.processes(gone.pid, "replica") == []
    assert not hand.listens(gone.pid, [1])


def test_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [server.getsockname()[1] for server in (one, two)]
        me = psutil.Process().pid
        assert Hand("node").listens(me, ports)
        two.close()
        assert not Hand("node").listens(me, ports)


def actor(
    name: str, number: int, *, owner: int = 99, kind: str = "ServeReplica", state: str = "ALIVE"
) -> dict[str, Any]:
    """A row of Ray's table; ``number`` is its pid, its port and its age."""
    address = {"IPAddress": "10.0.0.1", "Port": number, "NodeID": f"node{number % 2}"}
    return {
        "ActorID": f"id{number}",
        "ActorClassName": kind,
        "Name": name,
        "State": state,
        "Pid": number,
        "StartTime": number,
        "Address": address,
        "OwnerAddress": {**address, "Port": owner},
    }


def test_only_this_application_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        actor("SERVE_REPLICA::hycluster#replica-m#b", 2),
        actor("SERVE_REPLICA::hycluster#replica-m#a", 1),
        actor("SERVE_REPLICA::hycluster#replica-m#dead", 3, state="DEAD"),
        actor("SERVE_REPLICA::hycluster#replica-other#c", 4),
        actor("SERVE_REPLICA::someone#replica-m#d", 5),
        actor("SERVE_REPLICA::hycluster#ingress#e", 6),
        actor("SERVE_REPLICA::hycluster#batches#f", 7),
        actor("SERVE_CONTROLLER_ACTOR", 8, kind="ServeController"),
        actor("", 9, kind="MapWorker(MapBatches(Generate))"),
        actor("", 11, owner=1, kind="OtherRank"),
        actor("", 12, owner=2, kind="OtherRank"),
        actor("", 13, owner=1, kind="OtherRank", state="DEAD"),
        actor("", 14, kind="SomebodysActor"),
    ]
    monkeypatch.setattr("ray._private.state.actors", lambda: {row["ActorID"]: row for row in rows})
    found = Targets("replica-m")
    replicas = found.find(Where.REPLICA)
    # The oldest first, whatever their random names.
    assert [(target.name, target.pid, target.node_id) for target in replicas] == [
        ("replica-m#a", 1, "node1"),
        ("replica-m#b", 2, "node0"),
    ]
    assert [target.ranks for target in replicas] == [(("node1", 11),), (("node0", 12),)]
    assert [target.pid for target in found.find(Where.INGRESS)] == [6]
    assert [target.pid for target in found.find(Where.BATCH)] == [7, 9]


def test_the_table_is_rays_and_the_names_are_serves() -> None:
    """What the rows of these tests are made after."""
    from ray._private import state as table_of
    from ray.serve._private.common import DeploymentID, ReplicaID

    replica = ReplicaID("a", DeploymentID("replica-m", "hycluster"))
    assert replica.to_full_id_str() == "SERVE_REPLICA::hycluster#replica-m#a"
    table = inspect.getsource(table_of.GlobalState._gen_actor_info)
    for column in actor("", 1):
        assert f'"{column}"' in table
