"""A job on real engines whose driver, worker and engine are killed by SIGKILL: the output is that of a quiet run.

The kills at every single write are in tests/batch (a stand-in for the engines) and tests/batch/test_chaos_engines.py
(simulated engines behind the real gateway).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import ray

from hycluster.batch.progress.status import Watcher
from tests.batch.conftest import write_texts
from tests.families import words_below
from tests.integration.conftest import TINY, Served, eventually, replicas
from tests.located import at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROWS = 2000
SHARDS = 26
JOB = {
    "name": "chaos",
    "model": TINY,
    "task": "generate",
    "prompt": "Say it again: {text}",
    "input": {"columns": {"text": "text"}},
    "sampling": {"max_tokens": 3, "temperature": 0},
    "shard_rows": 80,
    "rows_in_flight": 32,
    "max_quarantined_fraction": 0.01,
}
Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Runs:
    """Runs of one job over one corpus, each into an output of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # One row without a text goes to the quarantine.
        texts = [None if n == 1000 else f"row {n} of {ROWS}" for n in range(ROWS)]
        write_texts(folder / "corpus" / "a.parquet", texts[:1230], row_group_size=300)
        write_texts(folder / "corpus" / "b.parquet", texts[1230:])
        (folder / "job.yaml").write_text(json.dumps(JOB))

    def output(self, name: str) -> Path:
        return self._folder / name

    def _command(self, command: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hycluster", "batch", command, *arguments, "--input", f"{self._folder}/corpus"]

    @contextmanager
    def begun(self, name: str) -> Iterator[subprocess.Popen[str]]:
        """A run in a process of its own, in the cluster that the test has joined."""
        command = self._command("run", f"{self._folder}/job.yaml", "--output", str(self.output(name)))
        env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        log = self._folder / f"{name}.log"
        with (
            log.open("a") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as run,
        ):
            try:
                yield run
            finally:
                run.kill()

    def finish(self, run: subprocess.Popen[str]) -> str:
        """What it printed; it must have ended well."""
        printed, _ = run.communicate(timeout=600)
        assert run.returncode == 0, printed
        return printed

    def committed(self, name: str) -> dict[str, bytes]:
        """The shards' records by their names."""
        folder = self.output(name) / "_shards"
        if not folder.exists():
            return {}
        return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.json"))}

    def reach(self, name: str, shards: int) -> None:
        """Wait for the moment after a record was written, the middle of the job."""
        eventually(lambda: len(self.committed(name)) >= shards, 240, f"{shards} shards are committed")
        assert not (self.output(name) / "_SUCCESS").exists(), "the job was over before it could be disturbed"

    def rows(self, name: str) -> Rows:
        """Finished and quarantined rows, proved by ``batch verify`` and read by the manifest."""
        out = self.output(name)
        checked = subprocess.run(
            self._command("verify", str(out)), check=False, capture_output=True, text=True, timeout=120
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        shards = json.loads((out / "_manifest.json").read_text())["shards"]
        assert len(shards) == SHARDS
        finished, quarantined = (
            [row for shard in shards if shard[kind] for row in pq.read_table(out / shard[kind]["path"]).to_pylist()]
            for kind in ("part", "quarantine")
        )
        return finished, quarantined


def processes(served: Served, is_it: Callable[[str], bool]) -> list[psutil.Process]:
    return [process for process, words in words_below(served.process.pid).items() if is_it(" ".join(words))]


def kill_worker(served: Served) -> None:
    (worker,) = processes(served, lambda title: "Generate" in title)
    os.kill(worker.pid, signal.SIGKILL)


def kill_engine(served: Served) -> None:
    (engine,) = processes(served, lambda title: f"replica-{TINY}" in title)
    os.kill(engine.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Rows:
    with runs.begun("undisturbed") as run:
        runs.finish(run)
    rows = runs.rows("undisturbed")
    assert (len(rows[0]), len(rows[1])) == (ROWS - 1, 1)
    # A random model says little; that each row has its own answer is shown with the simulated engine.
    assert len({row["output"] for row in rows[0]}) > 1
    return rows


def test_whatever_is_killed_its_output_is_that_of_a_quiet_run(runs: Runs, served: Served, undisturbed: Rows) -> None:
    """The engine, the driver, the worker, then all three at once."""
    with runs.begun("disturbed") as run:
        runs.reach("disturbed", 4)
        kill_engine(served)
        runs.reach("disturbed", len(runs.committed("disturbed")) + 3)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    # Ray ends what the driver has started; whatever that commits on its last way counts.
    eventually(lambda: not processes(served, lambda title: "Generate" in title), 60, "the driver's worker is gone")
    kept = runs.committed("disturbed")
    with runs.begun("disturbed") as run:
        runs.reach("disturbed", len(kept) + 3)
        kill_worker(served)
        runs.reach("disturbed", len(runs.committed("disturbed")) + 3)
        kill_engine(served)
        kill_worker(served)
        run.kill()
    eventually(lambda: not processes(served, lambda title: "Generate" in title), 60, "the driver's worker is gone")
    kept_too = runs.committed("disturbed")
    assert kept.items() <= kept_too.items()
    assert len(kept_too) < SHARDS
    with runs.begun("disturbed") as run:
        printed = runs.finish(run)
    earlier = sum(json.loads(record)["rows"] for record in kept_too.values())
    assert f"done earlier {earlier}" in " ".join(printed.replace("│", " ").split())
    assert kept_too.items() <= runs.committed("disturbed").items()
    assert runs.rows("disturbed") == undisturbed
    # For the tests after this one.
    eventually(lambda: any(replica.accepting for replica in replicas(TINY)), 120, "the engine is back")


@contextmanager
def flood(served: Served) -> Iterator[threading.Event]:
    """More online requests than the engine has slots, without a pause, until the event is set."""
    over = threading.Event()
    body = {"model": TINY, "prompt": "on and on", "max_tokens": 200, "ignore_eos": True}

    def ask() -> None:
        while not over.is_set():
            httpx.post(f"{served.http}/v1/completions", json=body, timeout=120).raise_for_status()

    with ThreadPoolExecutor(6) as callers:
        asking = [callers.submit(ask) for _ in range(6)]
        try:
            yield over
        finally:
            over.set()
    for each in asking:
        each.result()


@contextmanager
def chaos(log: Path) -> Iterator[subprocess.Popen[str]]:
    """``hycluster chaos`` in a process of its own: more online requests than slots, and the only replica is killed."""
    command = [sys.executable, "-m", "hycluster", "chaos", "--model", TINY, "--json", "--yes", "--count", "1"]
    command += ["--streams", "18", "--concurrency", "6", "--output-tokens", "32-128"]
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (
        log.open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env) as run,
    ):
        try:
            yield run
        finally:
            run.kill()


def computed() -> tuple[int, int]:
    """Tokens of bulk and of online work that the engine has computed, as its replica last said."""
    (replica,) = replicas(TINY)
    assert replica.load.colocation is not None
    return replica.load.colocation.bulk_tokens, replica.load.colocation.online_tokens


def test_online_requests_that_leave_nothing(runs: Runs, served: Served, undisturbed: Rows, tmp_path: Path) -> None:
    """First in a flood, then while ``hycluster chaos`` asks, compares, and kills the engine."""
    with runs.begun("beside") as run:
        runs.reach("beside", 3)
        with flood(served) as over:
            watcher = Watcher(at(runs.output("beside")))
            status = eventually(
                lambda: status if (status := watcher.look()).waiting else None, 120, "the job says that it waits"
            )
            assert ", waiting: online traffic, " in status.line()
            before, (bulk, online) = len(runs.committed("beside")), computed()
            eventually(lambda: computed()[1] > online + 2000, 60, "the flood is served")
            # A shard that was through but for its commit.
            assert len(runs.committed("beside")) <= before + 1
            bulk_since, online_since = (now - then for now, then in zip(computed(), (bulk, online), strict=True))
            assert bulk_since < 0.1 * online_since
            # It needs some seconds until it asks; the job must not be over by then.
            with chaos(tmp_path / "chaos.log") as hitting:
                said = tmp_path / "chaos.log"
                eventually(lambda: "undisturbed" in said.read_text(), 60, "hycluster chaos begins")
                over.set()
                eventually(lambda: "kill " in said.read_text(), 120, "it kills the engine")
                assert not (runs.output("beside") / "_SUCCESS").exists(), "the job was over before"
                answered, _ = hitting.communicate(timeout=240)
        assert hitting.returncode == 0, answered + said.read_text()
        printed = runs.finish(run)
    found = json.loads(answered)
    assert (found["failures"], found["wrong"], found["faults"]) == ([], [], {"kill replica": 1})
    assert found["exact_requests"] > 0
    assert "waiting: online traffic" in printed
    assert runs.rows("beside") == undisturbed
