"""A driver that kills itself at one write. The faults are here; the product knows nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from hycluster.batch import run
from hycluster.batch.generate import Generate
from hycluster.batch.input import apart
from hycluster.batch.input.corpus import ShardPlan, read_shards, spans
from hycluster.batch.input.tables import pack
from hycluster.batch.job import Job
from hycluster.batch.output import commit
from hycluster.batch.output.record import ShardRecord
from hycluster.batch.task import open_task
from hycluster.storage import WritableFolder
from hycluster.storage.bucket import BucketFolder
from hycluster.storage.disk import DiskFolder
from tests.batch.stand_in import stand_in

SPAN_BYTES = 30_000
# The writes of a run, by what they write. The n-th of a kind is the one that kills.
WRITES = ("_coordinator/", "_job.json", "part", "_quarantine/", "_shards/", "_manifest.json", "_SUCCESS")
WHEN = ("before", "amid", "after")
# Not a write; the n-th file that --overwrite or the clean-up deletes.
DELETION = "deletion"
KINDS_OF_FOLDERS: tuple[Any, ...] = (DiskFolder, BucketFolder)


def drive(job: Job, kind: str | None, when: str, nth: int, overwrite: bool, begun: Path) -> None:
    """Run a job without Ray; runs in a process of its own.

    Args:
        kind: of :data:`WRITES`, or :data:`DELETION`; None lets it live.
        begun: file for the numbers of the shards whose generation was begun.
    """
    _fork_reader()
    if kind is not None:
        arm(kind, when, nth)
    patch.object(run, "_generate", _generate_here(begun)).start()
    run.run_job(job, engines=lambda _: contextlib.nullcontext(stand_in()), overwrite=overwrite)


def _fork_reader() -> None:
    """The process that reads footers, while this one has no threads; else it would import what is here already."""
    ours, theirs = Pipe()
    if not os.fork():
        ours.close()
        with contextlib.suppress(ConnectionError):  # this one has been killed
            apart.answer_calls(theirs.fileno())
        os._exit(0)
    theirs.close()
    vars(apart._READER)["_line"] = ours


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, when: str, nth: int) -> None:
    seen = 0
    if kind == DELETION:
        _arm_deletion(nth)
        return

    def struck(path: str) -> bool:
        nonlocal seen
        folder, name = path.split("/")[-2:]
        seen += f"{folder}/".startswith(kind) or (name.startswith(kind) and folder != "_quarantine")
        return seen == nth

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: WritableFolder, path: str, data: Any) -> Any:
            if not struck(self.at(path)):
                return real(self, path, data)
            if when == "before":
                die()
            if when == "amid":
                _cut_off(real, self, path, data)
            real(self, path, data)
            return die()

        return call

    for kind_of_folder in KINDS_OF_FOLDERS:
        for name in ("write", "create", "replace"):
            setattr(kind_of_folder, name, wrapped(getattr(kind_of_folder, name)))
    if kind == "_manifest.json":
        _arm_manifest(when)


def _cut_off(real: Callable[..., Any], folder: WritableFolder, path: str, data: Any) -> None:
    """Die with half of a file on the disk, or with a finished temporary file in its place."""
    if real.__name__ == "write":
        real(folder, path, bytes(data)[: len(data) // 2])
        die()
    patch.object(os, "link", die).start()
    patch.object(Path, "replace", die).start()


def _arm_deletion(nth: int) -> None:
    seen = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def delete(self: WritableFolder, paths: Iterable[str]) -> None:
            nonlocal seen
            for path in paths:
                seen += 1
                if seen == nth:
                    die()
                real(self, [path])

        return delete

    for kind in KINDS_OF_FOLDERS:
        patch.object(kind, "delete", wrapped(kind.delete)).start()


def _arm_manifest(when: str) -> None:
    """The manifest is a stream: its write begins with ``finish`` and ends before the next deletion."""
    finish = commit.OutputFolder.finish

    def armed(output: commit.OutputFolder, *args: Any) -> None:
        records = commit.OutputFolder.records

        def some(output: commit.OutputFolder) -> Iterator[ShardRecord]:
            for position, record in enumerate(records(output)):
                if position == 5:
                    die()
                yield record

        if when == "before":
            die()
        if when == "amid":
            patch.object(commit.OutputFolder, "records", some).start()
        else:
            for kind in KINDS_OF_FOLDERS:
                patch.object(kind, "delete", die).start()
        finish(output, *args)

    patch.object(commit.OutputFolder, "finish", armed).start()


def _generate_here(log: Path) -> Callable[..., float]:
    def generate(job: Job, corpus: ShardPlan, output: commit.OutputFolder, connect: Any, *_: Any) -> float:
        done = output.done()
        pending = [shard for shard in corpus.shards() if shard.number not in done]
        log.write_text("".join(f"{shard.number}\n" for shard in pending))
        opened = partial(open_task, job, connect)
        actor = Generate(output, opened, lambda *_: None, name=job.name)

        async def work() -> None:
            for span in spans(pending, SPAN_BYTES):
                await actor(pa.concat_tables(map(pack, read_shards(corpus.folder, span))))

        begun_s = time.monotonic()
        asyncio.run(work())
        return time.monotonic() - begun_s

    return generate
