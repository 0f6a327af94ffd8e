"""Who gives way when a machine, or a pod, runs out of memory.

Ray's monitor kills what Ray can start again, the newest first, until enough is free: batch tasks, then the directory
and Serve's controller, which are small, then ingress and engines, whoever it is that has the memory. So it is off where
hycluster serves, and this is in its place. Above the same threshold

1. Ray Data's workers go, the largest first; Ray Data does their work again;
2. then engines that have more than their settings give them (``hardware``);
3. nothing that keeps to its bounds. What is left is the kernel's to choose (:func:`order_for_the_kernel`).

Each replica looks for its own node, and ``hycluster serve`` for the one that it started; one of them acts at a time.
See ``docs/health.md``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from hycluster.settings.model import Model

logger = logging.getLogger(__name__)

GIB = 1 << 30
LOOK_EVERY_S = 0.5
# What one is over a bound by must last: a kill, or a step's scratch, frees it by itself.
SUSTAINED_S = 2.0
SAY_AGAIN_S = 60.0
# Looking at each process of the node, and at each page of this one.
AROUND_EVERY_S = 15.0
# How long one that was killed may take to be gone.
GONE_AFTER_S = 5.0
# Share of the memory in use; Ray's own variable and default.
THRESHOLD_VARIABLE, THRESHOLD = "RAY_memory_usage_threshold", 0.95
# Ray's variable that says how often its monitor looks; 0 is never.
MONITOR_VARIABLE = "RAY_memory_monitor_refresh_ms"
# Process titles that Ray gives to the workers of Ray Data: a pool's actors, and tasks by the name of their operator.
_BATCH = re.compile(
    r"ray::(\w*MapWorker\b|(Read|Map|FlatMap|Filter|Write|Repartition|Shuffle|Sort|Aggregate)\w*(\(|->|$))"
)
# Not worth the work that is lost: about what a worker has that does nothing.
SMALLEST_VICTIM_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory of the machine, or of this container if it has a limit; what only keeps files at hand is free."""

    used_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        return self.used_bytes / self.total_bytes

    def __str__(self) -> str:
        return f"{self.used_bytes / GIB:.1f} of {self.total_bytes / GIB:.1f} GiB in use"


def usage(root: Path = Path("/sys/fs/cgroup")) -> MemoryUsage:
    """What is in use now.

    Args:
        root: where control groups are mounted; a container sees its own there.
    """
    machine = psutil.virtual_memory()
    for limit, used, files in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        # "max" is no limit.
        with contextlib.suppress(OSError, ValueError):
            most = int((root / limit).read_text())
            stat = dict(line.split() for line in (root / used).with_name("memory.stat").read_text().splitlines())
            held = int((root / used).read_text()) - sum(int(stat[name]) for name in files if name in stat)
            if most < machine.total:
                # What others have on the machine is not this container's to make room for.
                return MemoryUsage(held, most)
    return MemoryUsage(machine.total - machine.available, machine.total)


def threshold() -> float:
    """Share of the memory above which somebody has to go."""
    return float(os.environ.get(THRESHOLD_VARIABLE, THRESHOLD))


def bound_bytes(model: Model) -> int | None:
    """What one data-parallel rank may have, by the settings; None if they do not say (``hardware.memory_gib``)."""
    hardware, ranks = model.hardware, model.parallel
    if hardware.memory_gib is None:
        return None
    # A GPU's cache is in its own memory; a simulated engine has none.
    on_cpu = hardware.accelerator is None and model.simulated is None
    cache_gib = hardware.kv_cache_gib * ranks.devices_per_rank if on_cpu else 0.0
    return int((hardware.memory_gib / ranks.data + cache_gib + (hardware.kv_offload_gib or 0.0)) * GIB)


def held_bytes(process: psutil.Process, at_most: int = 0) -> int:
    """Memory of a process and of all below it; what they share counts once.

    Args:
        at_most: if it is surely no more than that, a figure too high is good enough: the exact one has the kernel walk
            all of the pages, and changes to the process' memory wait for it.
    """
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
    roughly = sum(_bytes(each, lambda p: p.memory_info().rss) for each in family)
    return roughly if roughly <= at_most else sum(_bytes(each, lambda p: p.memory_full_info().pss) for each in family)


def _bytes(process: psutil.Process, figure: Callable[[psutil.Process], int]) -> int:
    try:
        return figure(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


# By process title, how late the kernel is to take a worker: from the raylet's own score (0) to that of workers in
# general (1000), the first to go. Ray gives all workers the same, and among these the kernel takes the largest: an
# engine.
_KERNEL_ORDER = (
    (re.compile(r"ray::(ServeController|Directory|ServeReplica:\w+:(ingress|batches))\b"), 0),
    (re.compile(r"ray::(ServeReplica:\w+:replica-|Replica|OtherRank|RayWorker)"), 500),
)


def order_for_the_kernel(raylet: psutil.Process) -> None:
    """Tell the kernel whom to take first, should it come to that: batch tasks, then engines, then what leads them."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        least = int(_score_file(raylet).read_text())
        for process in raylet.children():
            with contextlib.suppress(OSError, psutil.Error):
                title = _title(process)
                for pattern, place in _KERNEL_ORDER:
                    if pattern.match(title):
                        _score_file(process).write_text(str(least + (1000 - least) * place // 1000))


def _score_file(process: psutil.Process) -> Path:
    return Path(f"/proc/{process.pid}/oom_score_adj")


def batch_workers(raylet: psutil.Process) -> list[tuple[int, psutil.Process]]:
    """Ray Data's workers below a raylet that are worth it, with the bytes they hold, the largest first."""
    found = []
    for process in raylet.children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if _BATCH.match(_title(process)):
                found.append((held_bytes(process), process))
    return sorted((each for each in found if each[0] >= SMALLEST_VICTIM_BYTES), key=lambda each: -each[0])


class MemoryGuard:
    """Looks at this node's memory from :meth:`start` to :meth:`stop`, and makes room.

    Args:
        raylet: the process whose workers are this node's.
        bound_bytes: what this process and those below it may have; None if nobody has said, or it is no engine.
        end: ends this process, with the reason, when it is over its bound.
        tell: hears of everything that goes, whoever ended it; by default it is logged by who did.
    """

    def __init__(
        self,
        raylet: psutil.Process,
        *,
        bound_bytes: int | None = None,
        end: Callable[[str], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._raylet = raylet
        self._bound_bytes = bound_bytes
        self._end = end
        self._tell = tell
        self._journal = Journal(raylet.pid)
        self._over_since: float | None = None
        self._warned = False
        self._looked_around_s = self._said_s = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="memory", daemon=True)

    def start(self) -> None:
        if self._tell is not None:
            # Another raylet's, of an earlier time.
            self._journal.path.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_looking(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            try:
                self._look_around()
                self.look()
                self._tell_news()
            except psutil.NoSuchProcess:
                # The raylet has ended, and so will this process.
                continue
            except OSError:
                logger.warning("can't look after this node's memory; trying again", exc_info=True)
                self._stopping.wait(AROUND_EVERY_S)

    def _tell_news(self) -> None:
        if self._tell is not None:
            for line in self._journal.news():
                self._tell(line)

    def _look_around(self) -> None:
        if time.monotonic() - self._looked_around_s > AROUND_EVERY_S:
            self._looked_around_s = time.monotonic()
            order_for_the_kernel(self._raylet)
            self._warn_if_over()

    def look(self) -> None:
        """Look once; make room if there must be some."""
        if usage().share <= threshold():
            self._over_since = None
            return
        with self._journal.turn() as mine:
            # Somebody else is making room, or just has.
            if not mine or (now := usage()).share <= threshold():
                return
            if workers := batch_workers(self._raylet):
                held, worker = workers[0]
                self._write(
                    f"process {worker.pid}, {_title(worker)}, {_gib(held)}, is ended; Ray Data does it again", now
                )
                with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    worker.kill()
                    worker.wait(GONE_AFTER_S)
                return
            self._over_since = self._over_since or time.monotonic()
            if time.monotonic() - self._over_since < SUSTAINED_S:
                return
            if self._end is not None and (problem := self._problem()):
                # The turn goes with the process, and by then its memory is free.
                self._end(self._write(f"engine {os.getpid()} is ended: {problem}", now))
            elif self._tell is not None and time.monotonic() - self._said_s > SAY_AGAIN_S:
                self._said_s = time.monotonic()
                self._write(f"nothing here is over its bounds, so nothing is ended; the largest: {_largest()}", now)

    def _problem(self) -> str | None:
        """That this process has more than it was given; None if it has not."""
        if self._bound_bytes is None:
            return None
        held = held_bytes(psutil.Process(), at_most=self._bound_bytes)
        if held <= self._bound_bytes:
            return None
        return f"it has {_gib(held)}, and its settings (hardware) give it {_gib(self._bound_bytes)}"

    def _warn_if_over(self) -> None:
        if not self._warned and (problem := self._problem()):
            self._warned = True
            logger.warning("this engine is the first to be ended when memory runs out: %s", problem)

    def _write(self, what: str, now: MemoryUsage) -> str:
        line = f"out of memory ({now}, at most {threshold():.0%}): {what}"
        self._journal.write(line)
        if self._tell is None:
            logger.warning(line)
        return line


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _title(process: psutil.Process) -> str:
    # A title is written over the arguments that a process was started with, and may leave blanks.
    return " ".join(process.cmdline()).strip()


def _largest(count: int = 3) -> str:
    """The machine's largest processes; what they share with others counts for each."""
    found = [
        (each.info["memory_info"].rss, each.info["name"], each.pid)
        for each in psutil.process_iter(["name", "memory_info"])
        if each.info["memory_info"] is not None
    ]
    return ", ".join(f"{name} ({pid}) {_gib(size)}" for size, name, pid in sorted(found, reverse=True)[:count])


class Journal:
    """What was killed on a node: written by whoever did it, read by the process that has the terminal.

    Args:
        raylet: pid of the node's raylet.
    """

    def __init__(self, raylet: int) -> None:
        folder = Path(tempfile.gettempdir())
        self._lock = folder / f"hycluster-memory-{os.getuid()}.lock"
        self.path = folder / f"hycluster-memory-{os.getuid()}-{raylet}.log"
        self._read = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether it is this process' turn: one at a time, so that each sees what the one before has left."""
        with _opened(self._lock) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def write(self, line: str) -> None:
        with _opened(self.path) as file:
            os.write(file, f"{line}\n".encode())

    def news(self) -> list[str]:
        """Lines that this object has not told yet."""
        try:
            said = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        new, self._read = said[self._read :], len(said)
        return new


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    # In a folder that others may write to.
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)
