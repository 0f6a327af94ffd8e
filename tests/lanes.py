"""How the tests are spread over workers (``pytest -n``): what shares a cluster stays together, the heavy have lanes.

The tests that start clusters wait for much of their time, for one thing after the other. A lane of them and one of the
light tests keep two cores busy; a lane that has run dry helps the other. On two cores two workers had 93% of both; with
three that had something heavy, starts of engines took minutes and outlasted their limits. So a third worker has light
tests only, which take less than half a core and wait for the rest, and ends when it finds no others. Nor is that a gain
on two cores: 34 minutes where two workers take 28, for the whole is 50 minutes of CPU time.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parent.parent
# By the session's cluster, the files whose tests use it: one worker has them all, for it alone has the cluster.
SHARED = {
    "served": (
        "test_batch_api", "test_batch_chaos", "test_chaos", "test_ingress", "test_fuzz_floods", "test_fuzz_grpc",
        "test_fuzz_http", "test_health", "test_hunyuan_served", "test_ledger_served", "test_refusals",
        "test_replica_loss", "test_same_tokens", "test_summarize",
    ),
    "featured": (
        "test_adapters", "test_kv_reuse", "test_metrics", "test_sleep_routes", "test_speculative",
        "test_stored_responses",
    ),
}  # fmt: skip
# The files whose engines are forked from one process (``vllm_forks.py``), beside those of the clusters above.
FORKS = (
    "engine/test_names", "models/test_hunyuan", "models/test_hunyuan_features", "models/test_hunyuan_fp8",
    "models/test_hunyuan_golden", "models/test_parameter_count", "planning/test_allocated", "simulate/test_cli",
)  # fmt: skip
# What starts clusters or engines of its own, the longest first; ``served``, ``featured``, ``forks`` are those above.
HEAVY = (
    "served", "integration/test_expert_parallel", "integration/test_rehearsal", "forks", "featured",
    "integration/test_control_plane", "integration/test_start", "integration/test_rolling", "integration/test_spread",
    "integration/test_serve_deploy", "integration/test_ledger", "integration/test_load_curve",
    "integration/test_submit", "integration/test_drain",
)  # fmt: skip
# Before vLLM's threads are in the process: these fork one that starts Ray.
FORKING = ("batch/test_run", "batch/test_chaos_ray")
# Alone on the machine, so when nothing else is left.
LAST = ("integration/test_memory_pressure",)
# Of the light ones, so many are told by name.
_TOLD = 25
_ROOMS = {f"integration/{name}": room for room, names in SHARED.items() for name in names} | dict.fromkeys(
    FORKS, "forks"
)


def room_of(nodeid: str) -> str:
    """The tests that one worker runs one after the other: a file's, or all of a cluster's."""
    file = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return _ROOMS.get(file, file)


def check_shared(items: list[pytest.Item]) -> None:
    """A cluster of the session must not be started by two workers.

    Raises:
        pytest.UsageError: names the file that is not in the table.
    """
    for item in items:
        for room in SHARED:
            if room in getattr(item, "fixturenames", ()) and room_of(item.nodeid) != room:
                raise pytest.UsageError(f"{item.nodeid} uses {room!r}: its file must be among tests/lanes.py's SHARED")


class Lane(enum.Enum):
    """What a worker takes first."""

    HEAVY = enum.auto()
    # What needs vLLM, which a process imports once, then the other light ones; the next kind of worker the other way.
    VLLM = enum.auto()
    LIGHT = enum.auto()


def lane_of(worker: int, workers: int) -> Lane:
    """Half of the workers have the heavy lane, the smaller one."""
    if worker < max(workers // 2, workers == 1):
        return Lane.HEAVY
    return Lane.VLLM if worker == workers // 2 else Lane.LIGHT


class Lanes(LoadScopeScheduling):  # type: ignore[misc]
    """Hands each worker its lane's next room."""

    def _split_scope(self, nodeid: str) -> str:
        return room_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        if all(map(is_heavy, self.workqueue)) and self._heavy_beside(node) >= most_heavy(self.numnodes):
            node.shutdown()
            return
        lane = lane_of(int(node.gateway.id.removeprefix("gw")) % self.numnodes, self.numnodes)
        self.workqueue.move_to_end(min(self.workqueue, key=lambda room: _rank(room, lane)), last=False)
        super()._assign_work_unit(node)

    def _heavy_beside(self, node: WorkerController) -> int:
        """How many other workers have something heavy to do."""
        others = (rooms for other, rooms in self.assigned_work.items() if other is not node)
        return sum(any(is_heavy(room) and not all(tests.values()) for room, tests in rooms.items()) for rooms in others)


def most_heavy(workers: int) -> int:
    """How many of them may have something heavy at a time."""
    return max(2, workers - 1)


def is_heavy(room: str) -> bool:
    return room in HEAVY or room in LAST


def _rank(room: str, lane: Lane) -> tuple[int, int]:
    if room in LAST:
        return 3, 0
    if room in HEAVY:
        return 0 if lane is Lane.HEAVY else 2, HEAVY.index(room)
    if room in FORKING:
        return 1, FORKING.index(room) - len(FORKING)
    return 1, int(_imports_vllm(room) == (lane is Lane.LIGHT))


@functools.cache
def _imports_vllm(room: str) -> bool:
    """Whether the worker does; the one that has once should have the others' too."""
    return "vllm_imported" in (ROOT / "tests" / f"{room}.py").read_text(encoding="utf-8")


def spent(reports: Iterable[pytest.TestReport], began_s: float) -> Iterator[str]:
    """Lines by which HEAVY is kept in order: what each of these rooms takes, and when each worker had nothing left.

    Args:
        began_s: when the run began, as ``time.time`` says.
    """
    rooms: defaultdict[str, float] = defaultdict(float)
    light: defaultdict[str, float] = defaultdict(float)
    ends: dict[str, float] = {}
    for report in reports:
        room = room_of(report.nodeid)
        rooms[room if is_heavy(room) else "light"] += report.duration
        if not is_heavy(room):
            light[room] += report.duration
        if worker := getattr(report, "worker_id", None):
            ends[worker] = max(ends.get(worker, 0.0), report.stop - began_s)
    yield f"rooms: {_longest(rooms)}"
    yield f"of the light ones: {_longest(light, _TOLD)}"
    for worker, end_s in sorted(ends.items()):
        yield f"{worker} ended its last test after {end_s:.0f} s"


def _longest(rooms: Mapping[str, float], most: int | None = None) -> str:
    longest = sorted(rooms.items(), key=lambda room: -room[1])[:most]
    return ", ".join(f"{room} {seconds:.0f} s" for room, seconds in longest)


@contextlib.contextmanager
def place(alone: bool) -> Iterator[None]:
    """A test's place on the machine, among all workers of all runs of this user: beside others, or alone.

    Who is to be alone comes last of all, so it holds up nobody: it waits for a moment in which no other test runs.
    """
    with Path(tempfile.gettempdir(), f"hycluster-tests-{os.getuid()}.place").open("w") as kept:
        while alone and not _locked(kept, fcntl.LOCK_EX | fcntl.LOCK_NB):
            time.sleep(0.1)
        if not alone:
            fcntl.flock(kept, fcntl.LOCK_SH)
        yield


def _locked(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    return True
