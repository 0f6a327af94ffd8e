"""The life of a data-parallel group, with Ray's actors and simulated engines."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from hycluster import dedicated
from hycluster.directory.directory import ReplicaReport, open_directory
from hycluster.errors import SettingsError, why_not_started
from hycluster.replica.placement import actor_options
from hycluster.replica.rank import DrainTimes
from hycluster.replica.replica import Replica
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Hardware
from hycluster.settings.simulated import Simulated
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("some_ray")]

MODEL = Model(
    name="m",
    source="/m",
    parallel=Parallel(data=3, expert=True),
    hardware=Hardware(cpus=0.01),
    simulated=Simulated(),
)
LOOPBACK = DataPlane(host="127.0.0.1")


@pytest.fixture
def directory() -> Iterator[str]:
    name = f"group-{secrets.token_hex(4)}"
    handle = open_directory(name)
    yield name
    ray.kill(handle)


Start = Callable[..., Any]


@pytest.fixture
def start(directory: str) -> Iterator[Start]:
    """A replica as a dedicated pool has it."""
    started: list[tuple[Any, Any]] = []

    def begin(data_plane: DataPlane = LOOPBACK) -> Any:
        group = dedicated._placement_group(MODEL)
        actor = ray.remote(Replica).options(**actor_options(MODEL), **dedicated._in_first_bundle(group))
        started.append((actor.remote(MODEL, data_plane, directory, DrainTimes(0.5, 0.5)), group))
        return started[-1][0]

    yield begin
    for replica, group in started:
        ray.kill(replica)
        ray.util.remove_placement_group(group)


def processes(replica: Any) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in ray.get(replica.ready.remote())["pids"]]


def reports(directory: str) -> list[ReplicaReport]:
    view: Any = ray.get(open_directory(directory).view.remote("m"))
    return list(view.replicas)


def test_every_rank_is_there_for_gateways(start: Start, directory: str) -> None:
    replica = start()
    assert len({process.pid for process in processes(replica)}) == 3
    eventually(lambda: len(reports(directory)) == 3)
    there = reports(directory)
    assert len({report.group for report in there}) == 1
    assert len({report.address.requests for report in there}) == 3
    groups: Any = ray.get(open_directory(directory).models.remote())
    assert groups == {"m": 1}
    ray.get(replica.check_health.remote())


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_ranks_end_together(start: Start, victim: int) -> None:
    ranks = processes(start())
    os.kill(ranks[victim].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, 20)
    assert not alive


def test_a_stopped_group_has_left(start: Start, directory: str) -> None:
    replica = start()
    first, *others = processes(replica)
    eventually(lambda: len(reports(directory)) == 3)
    ray.get(replica.stop.remote())
    assert reports(directory) == []
    _, alive = psutil.wait_procs(others, 10)
    assert not alive
    assert first.is_running(), "the replica's own process is its owner's to end"


def test_why_a_rank_can_not_start_is_said(start: Start) -> None:
    replica = start(DataPlane(host="127.0.0.1", port_min=1, port_max=1))
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(replica.ready.remote())
    reason = why_not_started(str(caught.value))
    assert isinstance(reason, SettingsError)
    assert reason.message.startswith("data_plane: no port to bind on 127.0.0.1 from 1 to 1: ")
