"""Drivers and workers of jobs on a real Ray that kill themselves at a write, and a log of who did what.

The faults travel with what opens the engines in a worker; the product knows nothing of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import ray
from ray import cloudpickle

from hycluster.batch import generate, kept, run
from hycluster.batch.cli import Outside
from hycluster.batch.job import Job
from hycluster.batch.output.lease import Lease
from hycluster.batch.progress import progress_file
from hycluster.cli import batch_app as app
from hycluster.core import Generation, GenerationRequest
from hycluster.storage import WritableFolder
from hycluster.storage.disk import DiskFolder
from tests.batch import chaos_driver, stand_in

# Not a write: the driver hears of the n-th shard that was committed.
HEARD = "heard"
ANSWER_S = 0.2
ANSWERED_ROWS = 66


class LoggedStandIn(stand_in.StandInGenerator):
    """Writes down the prompt of every row that it is asked for, and takes its time.

    Ray needs a moment to end the worker of a driver that was killed; there must be work left then.
    """

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._asked = log

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.messages is not None
        note(self._asked, f"ask {request.messages[-1]['content']}")
        await asyncio.sleep(ANSWER_S)
        return await super().generate(request, deadline_s=deadline_s)


class HeldStandIn(stand_in.StandInGenerator):
    """Writes down the text of every row that it is asked for; while a file is there all but the first ones wait."""

    def __init__(self, held: Path, log: Path) -> None:
        super().__init__()
        self._held = held
        self._asked = log
        self._rows = 0

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.messages is not None
        note(self._asked, request.messages[-1]["content"])
        self._rows += 1
        place = self._rows
        while place > ANSWERED_ROWS and self._held.exists():  # noqa: ASYNC110 - it is another process's
            await asyncio.sleep(0.05)
        return await super().generate(request, deadline_s=deadline_s)


def note(log: Path, line: str) -> None:
    """Add a line, whole even where several processes write."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line.strip()}\n".encode())
    os.close(descriptor)


def drive_on_ray(
    job: Job,
    address: str,
    faults: Path,
    log: Path,
    fault: tuple[str, str, int] | None,
    environment: Mapping[str, str],
) -> None:
    """Run a job as a driver of a running Ray cluster; runs in a process of its own.

    Args:
        faults: folder with a file ``KIND WHEN NTH`` for each worker that is to die; the next worker takes the next.
        fault: the driver's own, None lets it live.
        environment: of the process that has joined the cluster.
    """
    _join(address, environment)
    if fault is not None and fault[0] == HEARD:
        _die_when_told(fault[2])
    elif fault is not None:
        chaos_driver.arm(*fault)
    run.run_job(job, engines=lambda _: nullcontext(partial(_open_in_worker, faults, log)))


def command_on_ray(
    arguments: Sequence[str], address: str, held: Path, log: Path, said: Path, environment: Mapping[str, str]
) -> None:
    """The command ``hycluster batch`` as it is, but for its engines; runs in a process of its own.

    Args:
        said: file for all that it prints.
    """
    _join(address, environment)
    # Those of who started this process may be others.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with said.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    patch.object(progress_file, "TELL_EVERY_S", 0.1).start()
    opened = nullcontext(partial(_open_held, held, log))
    app.info.context_settings = {"obj": Outside(lambda job, settings, address: opened, _submitted)}
    app(arguments)


def _submitted(job_id: str, address: str, *, follow: bool, as_json: bool) -> int:
    raise AssertionError("nothing was submitted")


def _join(address: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    for module in (stand_in, chaos_driver, __import__(__name__, fromlist=["_"])):
        # Ray's worker processes do not have the tests on their path.
        cloudpickle.register_pickle_by_value(module)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


@asynccontextmanager
async def _open_held(held: Path, log: Path) -> AsyncIterator[HeldStandIn]:
    patch.object(kept, "KEEP_EVERY_S", 0.2).start()
    patch.object(generate, "REPORT_EVERY_S", 0.1).start()
    yield HeldStandIn(held, log)


def _die_when_told(nth: int) -> None:
    told = 0

    def check(_: Lease) -> None:
        nonlocal told
        told += 1
        if told == nth:
            chaos_driver.die()

    patch.object(Lease, "check", check).start()


@asynccontextmanager
async def _open_in_worker(faults: Path, log: Path) -> AsyncIterator[LoggedStandIn]:
    note(log, "worker")
    _note_records(log)
    _arm_next(faults)
    yield LoggedStandIn(log)


def _arm_next(faults: Path) -> None:
    for path in sorted(faults.iterdir())[:1]:
        kind, when, nth = path.read_text().split()
        path.unlink()
        chaos_driver.arm(kind, when, int(nth))


def _note_records(log: Path) -> None:
    real: Callable[..., bool] = DiskFolder.create

    def create(self: WritableFolder, path: str, data: bytes) -> bool:
        created = real(self, path, data)
        if created:
            note(log, f"record {path.rpartition('/')[2]}")
        return created

    patch.object(DiskFolder, "create", create).start()
