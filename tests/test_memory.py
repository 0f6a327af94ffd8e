from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hycluster import memory
from hycluster.memory import GIB, Journal, MemoryGuard, MemoryUsage, bound_bytes, usage
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.waiting import eventually

TOTAL = psutil.virtual_memory().total


def control_group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    found = usage(tmp_path)
    assert found.total_bytes == TOTAL
    assert 0 < found.share < 1


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000\n", "memory.current": "950\n", "memory.stat": "inactive_file 100\nactive_file 50\n"},
        {
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.usage_in_bytes": "950",
            "memory/memory.stat": "total_inactive_file 100\ntotal_active_file 50",
        },
    ],
)
def test_a_container_without_what_files_hold(tmp_path: Path, files: dict[str, str]) -> None:
    assert usage(control_group(tmp_path, files)) == MemoryUsage(800, 1000)


def test_a_limit_that_is_none(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "10\n", "memory.stat": ""}
    assert usage(control_group(tmp_path, files)).total_bytes == TOTAL


@pytest.mark.parametrize(
    ("hardware", "parallel", "simulated", "gib"),
    [
        ({}, {}, False, None),
        ({"memory_gib": 3, "kv_cache_gib": 2}, {}, False, 5),
        ({"memory_gib": 3, "kv_cache_gib": 2, "kv_offload_gib": 4}, {}, False, 9),
        # The memory is a replica's, the cache each rank's.
        ({"memory_gib": 8, "kv_cache_gib": 1}, {"data": 2, "tensor": 2}, False, 6),
        ({"memory_gib": 64, "accelerator": "H20"}, {}, False, 64),
        ({"memory_gib": 1, "kv_cache_gib": 2}, {}, True, 1),
    ],
)
def test_what_an_engine_was_given(
    hardware: dict[str, float], parallel: dict[str, int], simulated: bool, gib: float | None
) -> None:
    model = Model.model_validate(
        {"name": "m", "source": "/m", "hardware": hardware, "parallel": parallel}
        | ({"simulated": Simulated()} if simulated else {})
    )
    assert bound_bytes(model) == (None if gib is None else gib * GIB)


@pytest.mark.parametrize(
    ("title", "batch"),
    [
        ("ray::MapWorker(MapBatches(Generate))", True),
        ("ray::_MapWorker", True),
        ("ray::ReadCorpus->SplitBlocks(2)", True),
        ("ray::Map(fn)->Filter(g)", True),
        ("ray::MapBatches(fn)", True),
        ("ray::ServeController", False),
        ("ray::ServeReplica:hycluster:ingress", False),
        ("ray::ServeReplica:hycluster:replica-mapworker", False),
        ("ray::Directory.report", False),
        ("ray::Replica", False),
        ("ray::RayWorkerProc", False),
        ("ray::JobProgress", False),
        ("ray::IDLE", False),
        ("ray::Mapmaker.run", False),
        ("python train.py", False),
    ],
)
def test_who_is_a_batch_worker(title: str, batch: bool) -> None:
    assert bool(memory._BATCH.match(title)) == batch


WORKER = """
import sys, time, setproctitle
kept = bytearray(int(sys.argv[2]) << 20)
kept[::4096] = b"x" * len(kept[::4096])
setproctitle.setproctitle(sys.argv[1])
print("there", flush=True)
time.sleep(600)
"""


class Node:
    """Stand-in for a node: this process is the raylet, and these below it are what Ray would call its workers."""

    def __init__(self) -> None:
        self.workers: dict[str, subprocess.Popen[str]] = {}

    def add(self, title: str, mib: int) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, title, str(mib)], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert worker.stdout is not None
        assert worker.stdout.readline() == "there\n"
        self.workers[title] = worker
        return worker

    def alive(self) -> set[str]:
        return {title for title, worker in self.workers.items() if worker.poll() is None}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Node]:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(memory, "SUSTAINED_S", 0.0)
    node = Node()
    yield node
    for worker in node.workers.values():
        worker.kill()
        worker.communicate()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the machine's memory is used up."""

    def say(yes: bool) -> None:
        monkeypatch.setattr(memory, "usage", lambda: MemoryUsage(96 if yes else 94, 100))

    return say


def test_the_largest_batch_worker_goes_first_and_nobody_else(node: Node, full: Callable[[bool], None]) -> None:
    kept = {"ray::ServeController", "ray::ServeReplica:hycluster:ingress", "ray::Map(idle)"}
    for title in kept - {"ray::Map(idle)"}:
        node.add(title, 200)
    node.add("ray::Map(idle)", 1)
    node.add("ray::MapWorker(MapBatches(Generate))", 120)
    node.add("ray::ReadCorpus", 180)
    guard = MemoryGuard(psutil.Process())
    full(False)
    guard.look()
    assert len(node.alive()) == 5
    full(True)
    guard.look()
    assert node.alive() == kept | {"ray::MapWorker(MapBatches(Generate))"}
    for _ in range(3):
        guard.look()
    assert node.alive() == kept
    said = Journal(os.getpid()).news()
    assert len(said) == 2
    assert re.search(
        r"out of memory \(.*, at most 95%\): process \d+, ray::ReadCorpus, 0.[12]\d GiB, is ended", said[0]
    )


def test_an_engine_over_its_bound_ends_and_one_within_does_not(node: Node, full: Callable[[bool], None]) -> None:
    ended: list[str] = []
    held = memory.held_bytes(psutil.Process())
    within = MemoryGuard(psutil.Process(), bound_bytes=2 * held, end=ended.append)
    unbound = MemoryGuard(psutil.Process(), end=ended.append)
    over = MemoryGuard(psutil.Process(), bound_bytes=held // 2, end=ended.append)
    full(False)
    over.look()
    full(True)
    within.look()
    unbound.look()
    assert ended == []
    # Batch work goes before it.
    node.add("ray::MapWorker(x)", 150)
    over.look()
    assert ended == []
    over.look()
    (why,) = ended
    assert re.search(r"engine \d+ is ended: it has .* GiB, and its settings \(hardware\) give it .* GiB$", why)


def test_one_at_a_time(node: Node, full: Callable[[bool], None]) -> None:
    node.add("ray::MapWorker(x)", 150)
    full(True)
    with Journal(1).turn() as mine:
        assert mine
        MemoryGuard(psutil.Process()).look()
        assert node.alive()
    MemoryGuard(psutil.Process()).look()
    assert not node.alive()


@pytest.mark.usefixtures("node")
def test_the_terminal_hears_of_all_that_goes_and_that_nothing_may(full: Callable[[bool], None]) -> None:
    said: list[str] = []
    guard = MemoryGuard(psutil.Process(), tell=said.append)
    full(False)
    Journal(os.getpid()).write("said of another raylet")
    guard.start()
    Journal(os.getpid()).write("said by another")
    full(True)
    eventually(lambda: len(said) >= 2)
    guard.stop()
    assert said[0] == "said by another"
    assert "nothing here is over its bounds, so nothing is ended; the largest: " in said[1]
    assert len(said) == 2


def test_the_kernel_is_told_whom_to_take_first(node: Node) -> None:
    titles = ["ray::MapWorker(x)", "ray::ServeReplica:hycluster:replica-m", "ray::ServeReplica:hycluster:ingress"]
    for title in titles:
        score = Path(f"/proc/{node.add(title, 1).pid}/oom_score_adj")
        # As Ray does.
        score.write_text("1000")
    least = int(Path("/proc/self/oom_score_adj").read_text())
    memory.order_for_the_kernel(psutil.Process())
    scores = [int(Path(f"/proc/{node.workers[title].pid}/oom_score_adj").read_text()) for title in titles]
    assert scores == [1000, (1000 + least) // 2, least]


def test_the_threshold_is_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_memory_usage_threshold", raising=False)
    assert memory.threshold() == 0.95
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.8")
    assert memory.threshold() == 0.8
