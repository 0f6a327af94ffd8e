"""The driver is killed at every write, then the same job is run again: nothing lost, nothing twice."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from hycluster.batch.job import Job
from tests.batch.chaos_driver import DELETION, WHEN, WRITES, drive
from tests.batch.conftest import write_texts
from tests.located import at
from tests.object_store import ObjectStore

ROWS = 2000
SHARD_ROWS = 80
# Shards of one block are in flight together; commits of its finished ones may be under way.
MOST_IN_FLIGHT = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts drivers fast: forked from a process that has imported everything and has no threads yet."""
    context = multiprocessing.get_context("forkserver")
    # One server for all tests of this process: with what those on a real Ray need too.
    context.set_forkserver_preload(["tests.batch.chaos_driver", "tests.batch.chaos_ray", "ray.data"])
    return context


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 rows in 26 shards of two files; every 50th has no text and goes to the quarantine."""
    folder = tmp_path_factory.mktemp("chaos") / "corpus"
    rows = [None if n % 50 == 7 else f"text {n} " + "word " * (n % 30) for n in range(ROWS)]
    write_texts(folder / "a.parquet", rows[:1230], row_group_size=300)
    write_texts(folder / "b.parquet", rows[1230:])
    return folder


def make_job(texts: Path, output: str, **changes: Any) -> Job:
    settings = {
        "name": "chaos",
        "model": "stand-in",
        "task": "generate",
        "input": {"path": str(texts), "columns": {"text": "text"}},
        "output": {"path": output},
        "shard_rows": SHARD_ROWS,
        "retry_s": 0,
        "max_quarantined_fraction": 0.05,
    }
    return Job.model_validate({**settings, **changes})


class Drivers:
    def __init__(self, processes: Any, log: Path) -> None:
        self._processes = processes
        self._log = log

    def run(self, job: Job, kind: str | None = None, when: str = "", nth: int = 1, overwrite: bool = False) -> set[int]:
        """The shards that were begun."""
        self._log.unlink(missing_ok=True)
        driver = self._processes.Process(target=drive, args=(job, kind, when, nth, overwrite, self._log))
        driver.start()
        driver.join(60)
        assert driver.exitcode == (0 if kind is None else -signal.SIGKILL)
        return {int(line) for line in self._log.read_text().split()} if self._log.exists() else set()


@pytest.fixture
def drivers(processes: Any, tmp_path: Path) -> Drivers:
    return Drivers(processes, tmp_path / "begun")


def listing(output: str) -> dict[str, bytes]:
    """Every file of an output with its bytes, by its path in it."""
    folder = at(output)
    found = [info for info in folder.entries(recursive=True) if info.type == pafs.FileType.File]
    files = [info.path[len(folder.root) + 1 :] for info in found]
    return {path: folder.open_file(path).readall() for path in files}


def contents(output: str) -> tuple[list[Any], list[Any]]:
    """Results and quarantined rows as the manifest names them; fails where anything else is there."""
    files = listing(output)
    assert files["_SUCCESS"] == b""
    manifest = json.loads(files["_manifest.json"])
    expected = {"_SUCCESS", "_manifest.json", "_job.json", "_report.json", "_report.html", ".huggingface.yaml"}
    rows: tuple[list[Any], list[Any]] = ([], [])
    edition = json.loads(files["_job.json"])["edition"]
    for position, shard in enumerate(manifest["shards"]):
        assert shard["shard"] == position
        expected.add(f"_shards/{position:08d}-{edition}.json")
        for held, written in zip(rows, (shard["part"], shard["quarantine"]), strict=True):
            if written:
                expected.add(written["path"])
                assert hashlib.sha256(files[written["path"]]).hexdigest() == written["sha256"]
                held.extend(pq.read_table(pa.BufferReader(files[written["path"]])).to_pylist())
    assert set(files) == expected
    ids = [row["row_id"] for held in rows for row in held]
    assert len(ids) == len(set(ids)) == manifest["totals"]["rows"] == ROWS
    return rows


@pytest.fixture(scope="module")
def done(processes: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nothing happened to; to be copied, not to be touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output = folder / "out"
    assert len(Drivers(processes, folder / "begun").run(make_job(texts, str(output)))) == 26
    return output


@pytest.fixture(scope="module")
def undisturbed(done: Path) -> tuple[list[Any], list[Any]]:
    rows = contents(str(done))
    assert (len(rows[0]), len(rows[1])) == (1960, 40)
    return rows


def drop_lease(output: Path) -> None:
    """Delete the lease of a killed run; a run that finds the job done writes nothing, so it leaves it there."""
    (left,) = (output / "_coordinator").iterdir()
    left.unlink()


def crash_and_resume(drivers: Drivers, job: Job, kind: str, when: str) -> None:
    nth = 9 if kind in ("part", "_quarantine/", "_shards/") else 1
    begun = drivers.run(job, kind, when, nth)
    files = listing(job.output.path)
    assert ("_SUCCESS" in files) == ((kind, when) == ("_SUCCESS", "after"))
    committed = {int(name[8:16]) for name in files if name.startswith("_shards/0")}
    if nth > 1:
        assert nth - 1 <= len(committed) <= nth + MOST_IN_FLIGHT
    again = drivers.run(job)
    # What was committed is never generated again; that is all but the shards in flight.
    assert again == (set(range(26)) - committed if len(committed) < 26 else set())
    assert not begun or begun >= again


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("when", WHEN)
def test_killed_at_a_write(
    drivers: Drivers, texts: Path, tmp_path: Path, undisturbed: Any, kind: str, when: str
) -> None:
    if (kind, when) == ("_SUCCESS", "amid"):
        when = "before"  # An empty file has no middle.
    job = make_job(texts, str(tmp_path / "out"))
    crash_and_resume(drivers, job, kind, when)
    if (kind, when) == ("_SUCCESS", "after"):
        drop_lease(tmp_path / "out")
    assert contents(job.output.path) == undisturbed


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("_job.json", "after"),
        ("part", "after"),
        ("_shards/", "before"),
        ("_shards/", "after"),
        ("_manifest.json", "after"),
        ("_SUCCESS", "before"),
    ],
)
def test_killed_at_a_write_to_an_object_store(
    drivers: Drivers, texts: Path, tmp_path: Path, store: ObjectStore, undisturbed: Any, kind: str, when: str
) -> None:
    job = make_job(texts, store.uri(f"{tmp_path.name}/out"))
    crash_and_resume(drivers, job, kind, when)
    assert contents(job.output.path) == undisturbed
    assert store.conditional_writes > 26


@pytest.mark.parametrize(
    ("kind", "when", "nth"),
    [
        *((DELETION, "before", nth) for nth in (1, 2, 20, 40)),
        ("_job.json", "before", 1),
        ("_job.json", "amid", 1),
        ("_job.json", "after", 1),
    ],
)
def test_killed_while_another_job_is_overwritten(
    drivers: Drivers, texts: Path, tmp_path: Path, done: Path, undisturbed: Any, kind: str, when: str, nth: int
) -> None:
    output = tmp_path / "out"
    new = make_job(texts, str(output), prompt="new {text}")
    shutil.copytree(done, output)
    (output / "notes.txt").write_text("mine")
    drivers.run(new, kind, when, nth, overwrite=True)
    # Nothing looks finished but the old job that was not touched yet.
    assert (output / "_SUCCESS").exists() == ((kind, nth) == (DELETION, 1))
    mixed = tmp_path / "mixed"
    shutil.copytree(output, mixed)
    assert len(drivers.run(new, overwrite=True)) == 26
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    results, quarantined = contents(str(output))
    assert [row["output"] for row in results] == [f"NEW {row['output']}" for row in undisturbed[0]]
    assert [row["row_id"] for row in quarantined] == [row["row_id"] for row in undisturbed[1]]
    if (kind, when) != ("_job.json", "after"):
        (mixed / "notes.txt").unlink()
        drivers.run(make_job(texts, str(mixed)))
        if (kind, nth) == (DELETION, 1):
            drop_lease(mixed)
        assert contents(str(mixed)) == undisturbed
