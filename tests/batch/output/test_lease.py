from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hycluster.batch.output import lease as lease_module
from hycluster.batch.output.lease import Lease
from hycluster.errors import JobFailed
from tests.located import at
from tests.object_store import ObjectStore
from tests.waiting import PATIENCE_S

HOLD = """
import sys, time
from hycluster.batch.output.lease import Lease
from hycluster.storage import locate
with Lease(locate(sys.argv[1], "output.path").writable()) as lease:
    lease.take()
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    store: ObjectStore = request.getfixturevalue("store")
    return store.uri(tmp_path.name)


def files(output: str) -> list[str]:
    return sorted(at(output).names("_coordinator"))


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process believes that it is on another machine than the holders so far."""
    here: dict[str, Any] = {"host": "elsewhere", "pid": 1, "machine": "another", "started": "1"}
    monkeypatch.setattr(lease_module, "_this_process", lambda: here)


def test_one_holds_it_and_the_other_is_told_who(output: str) -> None:
    with Lease(at(output)) as first:
        first.look()
        first.take()
        with Lease(at(output)) as second:
            for attempt in (second.look, second.take):
                with pytest.raises(
                    JobFailed,
                    match=r"^output.path: .* is being written by another run \(host .+, pid \d+, since 20.* UTC\)",
                ):
                    attempt()
        assert files(output) == ["00000001.json"]
    assert files(output) == []
    with Lease(at(output)) as third:
        third.take()


def test_looking_writes_nothing(tmp_path: Path) -> None:
    with Lease(at(tmp_path / "out")) as lease:
        lease.look()
    assert not list(tmp_path.iterdir())


def test_a_killed_process_of_this_machine_is_succeeded_at_once(output: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "taken\n"
    with Lease(at(output)) as second, pytest.raises(JobFailed, match=f"pid {driver.pid}"):
        second.take()
    driver.kill()
    driver.communicate()
    # Nobody waits for what a holder on another machine would be given.
    with Lease(at(output), expire_s=600) as third:
        third.look()
        third.take()
        assert files(output) == ["00000001.json", "00000002.json"]
    assert files(output) == []


def test_a_holder_elsewhere_lives_while_it_renews(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(at(output), renew_s=0.1) as first:
        first.take()
        elsewhere(monkeypatch)
        with Lease(at(output), expire_s=10) as second, pytest.raises(JobFailed, match="is being written by"):
            second.take()
        first.check()


def test_a_silent_holder_elsewhere_is_succeeded_and_stops_when_it_wakes_up(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(at(output), renew_s=60) as stalled:
        stalled.take()
        elsewhere(monkeypatch)
        with Lease(at(output), expire_s=0.5) as second:
            second.look()
            # It was watched once already, that is enough.
            monkeypatch.setattr(second, "_changes", lambda number, content: pytest.fail("watched again"))
            second.take()
            stalled.check()
            stalled.renew()
            with pytest.raises(JobFailed, match=r"was taken over by another run \(host elsewhere, pid 1, since"):
                stalled.check()


def test_of_many_who_find_a_dead_holder_one_succeeds_it(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at(output).make("_coordinator")
    # What a power cut leaves of a lease.
    at(output).write("_coordinator/00000007.json", b"")
    done = threading.Event()
    at_once = threading.Barrier(6)

    def run(_: int) -> bool:
        with Lease(at(output), expire_s=0.3) as lease:
            at_once.wait()
            try:
                lease.take()
            except JobFailed:
                return False
            done.wait(PATIENCE_S)
            return True

    with ThreadPoolExecutor(6) as runs:
        futures = [runs.submit(run, n) for n in range(6)]
        while sum(future.done() for future in futures) < 5:
            time.sleep(0.02)
        done.set()
        assert sorted(future.result() for future in futures) == [False] * 5 + [True]


def test_a_recycled_pid_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    with Lease(at(tmp_path)) as first:
        first.take()
        card = json.loads((tmp_path / "_coordinator" / "00000001.json").read_text())
    (tmp_path / "_coordinator" / "00000001.json").write_text(json.dumps({**card, "started": "1"}))
    with Lease(at(tmp_path)) as second:
        second.take()
        second.check()
