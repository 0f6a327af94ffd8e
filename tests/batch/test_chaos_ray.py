"""Workers and drivers of a job on a real Ray are killed at its writes: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hycluster.batch.output.verify import verify_output
from hycluster.batch.progress.status import Watcher
from tests.batch.chaos_ray import HEARD, command_on_ray, drive_on_ray
from tests.batch.conftest import write_texts
from tests.batch.test_chaos import MOST_IN_FLIGHT, SHARD_ROWS, contents, done, make_job, processes, texts, undisturbed
from tests.located import at
from tests.object_store import ObjectStore

__all__ = ["done", "processes", "texts", "undisturbed"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

AT_EVERY_WRITE = [(kind, when) for kind in ("part", "_quarantine/", "_shards/") for when in ("before", "amid", "after")]


class Cluster:
    """Drivers of one job, one after the other, and what their workers did."""

    def __init__(self, processes: Any, folder: Path) -> None:
        import ray

        self._processes = processes
        self._address = ray.get_runtime_context().gcs_address
        self._faults = folder / "faults"
        self._faults.mkdir()
        self._log = folder / "log"

    def kill_workers(self, *faults: tuple[str, str, int]) -> None:
        """The next workers die so, one after the other."""
        for turn, fault in enumerate(faults):
            (self._faults / f"{turn:02d}").write_text("{} {} {}".format(*fault))

    def run(self, job: Any, fault: tuple[str, str, int] | None = None) -> None:
        # The server that it is forked from may be older than this Ray, whose token it would then lack.
        environment = dict(os.environ)
        driver = self._processes.Process(
            target=drive_on_ray, args=(job, self._address, self._faults, self._log, fault, environment)
        )
        driver.start()
        driver.join(300)
        assert driver.exitcode == (0 if fault is None else -signal.SIGKILL)

    def command(self, *arguments: str, held: Path, until: Callable[[], bool] | None = None) -> tuple[int | None, str]:
        """Exit code of ``hycluster batch`` and what it said last; it gets a Ctrl-C as soon as ``until``."""
        said = self._log.with_name("said")
        driver = self._processes.Process(
            target=command_on_ray,
            args=(arguments, self._address, held, self._log, said, dict(os.environ)),
        )
        driver.start()
        if until is not None:
            end_s = time.monotonic() + 300
            while not until():
                assert driver.is_alive(), said.read_text()
                assert time.monotonic() < end_s, said.read_text()
                time.sleep(0.1)
            os.kill(driver.pid, signal.SIGINT)
        driver.join(300)
        return driver.exitcode, said.read_text().splitlines()[-1]

    @property
    def asked(self) -> list[int]:
        """Numbers of the rows that were asked, in order."""
        return [int(line.split()[1]) for line in self._log.read_text().splitlines()]

    @property
    def left(self) -> list[str]:
        """Faults that nobody has died of."""
        return sorted(path.name for path in self._faults.iterdir())

    def history(self) -> list[tuple[str, int]]:
        """In order: ``worker`` (one has begun, -1), ``ask`` and ``record`` with the number of the shard."""
        events = []
        for line in self._log.read_text().splitlines():
            event, _, rest = line.partition(" ")
            shard = -1
            if event == "ask":
                row = int(rest.split()[1])
                # The corpus has 1,230 rows in its first file.
                shard = row // SHARD_ROWS if row < 1230 else 16 + (row - 1230) // SHARD_ROWS
            elif event == "record":
                shard = int(rest[:8])
            events.append((event, shard))
        return events


@pytest.fixture
def cluster(processes: Any, tmp_path: Path) -> Cluster:
    return Cluster(processes, tmp_path)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    store: ObjectStore = request.getfixturevalue("store")
    return store.uri(f"{tmp_path.name}/out")


def lost_work(history: list[tuple[str, int]]) -> list[int]:
    """How many shards each worker but the last left begun and without a record."""
    open_shards: set[int] = set()
    recorded: set[int] = set()
    lost = []
    for event, shard in history:
        if event == "worker":
            lost.append(len(open_shards))
            open_shards.clear()
        elif event == "record":
            recorded.add(shard)
            open_shards.discard(shard)
        else:
            assert shard not in recorded, f"shard {shard} is committed and is generated again"
            open_shards.add(shard)
    return lost[1:]


def test_workers_killed_at_every_write_while_the_driver_lives(
    cluster: Cluster, texts: Path, undisturbed: Any, tmp_path: Path
) -> None:
    cluster.kill_workers(*((kind, when, 2) for kind, when in AT_EVERY_WRITE))
    job = make_job(texts, str(tmp_path / "out"))
    cluster.run(job)
    assert cluster.left == []
    assert contents(job.output.path) == undisturbed
    lost = lost_work(cluster.history())
    assert len(lost) == len(AT_EVERY_WRITE)
    assert max(lost) <= MOST_IN_FLIGHT


def test_workers_and_drivers_killed_in_turn(cluster: Cluster, texts: Path, undisturbed: Any, output: str) -> None:
    # At least 6 s for all rows.
    job = make_job(texts, output, rows_in_flight=64)
    cluster.kill_workers(("part", "amid", 2), ("_shards/", "after", 2))
    # Two workers die, then the driver while the third one is at work; Ray ends that one in its own time.
    cluster.run(job, (HEARD, "", 1))
    # Begins at once, whoever is still there.
    cluster.kill_workers(("_shards/", "before", 1), ("_quarantine/", "after", 1))
    cluster.run(job, ("_manifest.json", "amid", 1))
    cluster.run(job, ("_SUCCESS", "before", 1))
    cluster.run(job)
    assert cluster.left == []
    assert contents(job.output.path) == undisturbed


def test_ctrl_c_at_66_of_200_rows(cluster: Cluster, tmp_path: Path) -> None:
    """50 rows are committed, 16 of another shard are answered and 16 are in flight; these alone are asked again."""
    corpus, out, job_file = tmp_path / "in", tmp_path / "out", tmp_path / "job.json"
    write_texts(corpus / "a.parquet", [f"text {n}" for n in range(200)])
    job = make_job(corpus, str(out), shard_rows=50, rows_in_flight=16)
    job_file.write_text(job.model_dump_json(exclude_unset=True))
    held = tmp_path / "held"
    held.touch()

    def answered() -> bool:
        kept = {row_id for path in out.glob("_answers/*.json") for row_id in json.loads(path.read_bytes())}
        # Those of the committed shard may be among them until they are written the next time.
        if not kept or not kept >= {f"a.parquet#{row}" for row in cluster.asked[50:66]}:
            return False
        status = Watcher(at(out)).look()
        return (
            (status.done.rows, status.rows_through) == (50, 66)
            and status.word is not None
            and status.word.progress.in_flight == 16
        )

    code, said = cluster.command("run", str(job_file), held=held, until=answered)
    assert code == 130
    assert said.startswith(
        "stopped; 50 of 200 rows are committed, 16 more were answered: those of the last half minute"
    )
    first = cluster.asked
    assert len(set(first)) == len(first) == 66 + 16
    # The first run's worker, which Ray may not have ended yet, stays held.
    code, said = cluster.command("run", str(job_file), held=tmp_path / "never")
    assert code == 0, said
    assert sorted(cluster.asked[len(first) :]) == sorted({*range(200)} - {*first[:66]})
    verdict = verify_output(at(out), at(corpus))
    assert (verdict.faults, verdict.totals.rows, verdict.totals.quarantined) == ([], 200, 0)
    assert list(out.glob("_answers/*")) == []
