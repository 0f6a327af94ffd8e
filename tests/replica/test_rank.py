"""A rank that can't go on ends its process, however it is held up; with Ray's actors and simulated engines."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from hycluster.directory.directory import open_directory
from hycluster.replica.rank import DrainTimes
from hycluster.replica.replica import Replica
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.settings.pool import Health
from hycluster.settings.simulated import Simulated
from tests.families import words_below
from tests.waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("some_ray")]

Start = Callable[..., Any]


@pytest.fixture
def directory() -> Iterator[str]:
    name = f"rank-{secrets.token_hex(4)}"
    handle = open_directory(name)
    yield name
    ray.kill(handle)


@pytest.fixture
def start(directory: str) -> Iterator[Start]:
    started: list[Any] = []

    # Made here, so that Ray sends it whole: its workers have no tests to import.
    class Brittle(Replica):
        async def hang(self) -> None:
            self._rank._engine.hang()  # type: ignore[attr-defined]

        async def kill_engine(self) -> None:
            self._rank._engine.kill(RuntimeError("device lost"))  # type: ignore[attr-defined]

        async def have_company(self) -> None:
            """As when a second machine has joined the cluster."""
            from hycluster.replica import rank

            rank.LOOK_FOR_OTHERS_EVERY_S = 0.1
            rank._one_machine = lambda: False

    def begin(host: str | None = "127.0.0.1", **bounds: float) -> Any:
        model = Model(name="m", source="/m", simulated=Simulated(), health=Health(**bounds))
        actor: Any = ray.remote(num_cpus=0)(Brittle)
        started.append(actor.remote(model, DataPlane(host=host), directory, DrainTimes(0.5, 0.5)))
        return started[-1]

    yield begin
    for replica in started:
        ray.kill(replica)


def family(replica: Any) -> list[psutil.Process]:
    """The replica's process, then what it has started."""
    process = psutil.Process(ray.get(replica.ready.remote())["pid"])
    eventually(lambda: bool(process.children()))
    return [process, *words_below(process.pid)]


def all_end(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, PATIENCE_S)[1]


def test_a_dead_engine_takes_its_process_along(start: Start) -> None:
    replica = start()
    processes = family(replica)
    replica.kill_engine.remote()
    assert all_end(processes)


def test_so_does_one_that_hangs_while_nobody_asks_it(start: Start) -> None:
    replica = start(probe_after_s=0.5, hung_after_s=0.5)
    processes = family(replica)
    ray.get(replica.check_health.remote())
    replica.hang.remote()
    assert all_end(processes)


def test_a_stopped_process_is_killed_and_does_not_come_back(start: Start, directory: str) -> None:
    replica = start(stopped_after_s=0.5)
    processes = family(replica)

    def reports() -> list[Any]:
        view: Any = ray.get(open_directory(directory).view.remote("m"))
        return list(view.replicas)

    eventually(lambda: len(reports()) == 1)
    os.kill(processes[0].pid, signal.SIGSTOP)
    assert all_end(processes)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(replica.check_health.remote(), timeout=PATIENCE_S)


def test_one_that_is_stopped_in_good_order_is_not_killed(start: Start) -> None:
    replica = start(probe_after_s=0.2, hung_after_s=0.5)
    process, *watchdogs = family(replica)
    ray.get(replica.stop.remote())
    assert all_end(watchdogs)
    assert process.is_running()


def test_it_listens_on_loopback_until_the_cluster_has_another_machine(start: Start, directory: str) -> None:
    replica = start(host=None)
    ray.get(replica.ready.remote())

    def endpoints() -> list[str]:
        view: Any = ray.get(open_directory(directory).view.remote("m"))
        return [endpoint for report in view.replicas for endpoint in (report.address.requests, report.address.outputs)]

    eventually(lambda: len(endpoints()) == 2)
    assert all(endpoint.startswith("tcp://127.0.0.1:") for endpoint in endpoints())
    here = ray.util.get_node_ip_address()
    assert here != "127.0.0.1"
    ray.get(replica.have_company.remote())
    eventually(lambda: all(endpoint.startswith(f"tcp://{here}:") for endpoint in endpoints()))
