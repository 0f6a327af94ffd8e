"""A job from its settings to ``_SUCCESS``; the stops in order.

plan -> engines -> lease -> claim the output -> read and generate (Ray Data) -> report -> manifest
-> ``_SUCCESS``.
Run again after any failure, it does the shards that have no record yet.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from rich.console import Console

from hycluster import terminal
from hycluster.batch.input.apart import footers_apart
from hycluster.batch.input.corpus import ShardPlan, plan_shards
from hycluster.batch.job import Job
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.identity import Identity, identity, suffix_in
from hycluster.batch.output.lease import Lease
from hycluster.batch.output.record import ShardRecord, Totals
from hycluster.batch.progress.figures import REPORT_HTML, write_report
from hycluster.batch.progress.page import figure_warnings
from hycluster.batch.progress.progress_file import STOPPED, Teller, tell_end
from hycluster.batch.progress.terminal import JobProgress, Reporter, RunProgress, print_totals
from hycluster.batch.prompts import prompt_of
from hycluster.batch.quarantine_limit import check_quarantine
from hycluster.batch.task import Connect
from hycluster.errors import HyclusterError, JobFailed, SettingsError, TooManyQuarantined
from hycluster.storage import locate, masked_line

# What a job generates with, while the block lasts.
Engines = Callable[[Job], AbstractContextManager[Connect]]
# Files at fault that are named when a job begins.
MOST_FAULTS = 10
PROGRESS_WITHIN_S = 10.0
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
log = logging.getLogger(__name__)


def run_job(
    job: Job,
    *,
    engines: Engines,
    overwrite: bool = False,
    consent: Callable[[str], None] = lambda what: None,
) -> None:
    """Run a job to its committed output, or say that it is there already.

    Args:
        engines: opens what to generate with; called only if there is something to generate.
        overwrite: if the output is that of another job or input, delete it and start anew, as soon as there are
            engines. An output of this very job is resumed all the same.
        consent: is told what is to be deleted, before; raises if that is not wanted.

    Raises:
        SettingsError: job, input or output are refused; nothing was done.
        TooManyQuarantined: more rows were quarantined than the job allows; there is no ``_SUCCESS``.
        JobFailed: anything else; the same job goes on where it stopped.
    """
    console = terminal.console()
    begun_s = time.monotonic()
    prompt = prompt_of(job)
    corpus = plan_shards(
        locate(job.input.path, "input.path"),
        shard_rows=job.shard_rows,
        check=prompt.check,
        read_footers=footers_apart,
        snapshot=job.input.snapshot,
    )
    _say_faults(corpus, console)
    output = OutputFolder(locate(job.output.path, "output.path"))
    if output.is_input(corpus):
        raise SettingsError(f"output.path: {output.folder.masked!r} lies within the input; give a folder outside of it")
    mine = identity(job, corpus)
    if suffix_in(mine):
        console.print(f"the columns of this job end with {suffix_in(mine)!r}: output{suffix_in(mine)}, ...", **PLAIN)
    replaces = overwrite and output.foreign(mine)
    if replaces:
        consent(_to_be_deleted(job, output))
    if not replaces and output.finished(mine):
        _say_done(job, output, console)
        return
    earlier = Totals() if replaces else _totals(output.records())
    check_quarantine(job, corpus, earlier)
    output.check_store()
    in_work_s = 0.0
    with Lease(output.folder) as lease:
        # Now, so that nobody waits for engines in vain; taken only when there is something to write.
        lease.look()
        try:
            if earlier.rows < corpus.rows:
                with engines(job) as connect:
                    if _claim(output, mine, lease, replaces):
                        _say_done(job, output, console)
                        return
                    in_work_s = _generate(job, corpus, output, connect, earlier, lease, console)
            elif _claim(output, mine, lease, replaces):
                _say_done(job, output, console)
                return
            committed = _totals(output.records())
            if committed.rows != corpus.rows:
                raise JobFailed(f"{committed.rows} of {corpus.rows} rows are committed; run the same command again")
            check_quarantine(job, corpus, committed)
            Teller(output.folder, output.edition(), 0).end()
            found = write_report(output.folder)
            lease.renew()
            lease.check()
            output.finish(mine, asdict(committed))
        except HyclusterError as error:
            _say_ended(output, lease, error)
            raise
        except Exception as error:
            log.debug("the job failed", exc_info=True)
            failed = JobFailed(f"{type(error).__name__}: {masked_line(error)}")
            _say_ended(output, lease, failed)
            raise failed from error
        except (KeyboardInterrupt, SystemExit):
            _say_ended(output, lease, JobFailed(STOPPED))
            raise
    this_run = Totals(*(getattr(committed, name) - getattr(earlier, name) for name in asdict(earlier)))
    print_totals(
        console, f"{job.name} -> {output.folder.masked}", committed, this_run, time.monotonic() - begun_s, in_work_s
    )
    for warning in figure_warnings(found):
        console.print(f"warning: {warning}", **PLAIN)
    console.print(f"report: {found['output']}/{REPORT_HTML}", **PLAIN)


def _to_be_deleted(job: Job, output: OutputFolder) -> str:
    theirs = _totals(output.records())
    return (
        f"--overwrite: {output.folder.masked} is the output of another job or input, with {theirs.rows} committed"
        f" rows; they are deleted, and {job.name!r} begins anew there"
    )


def _claim(output: OutputFolder, mine: Identity, lease: Lease, overwrite: bool) -> bool:
    """Take the output, emptied first where that is asked for and needed. True if another run of this job finished it.

    Only once there are engines: a job that finds none must not leave its mark.
    """
    lease.take()
    # Looked at again: while there were no engines yet, another run may have been here and gone.
    if overwrite and output.foreign(mine):
        output.clear(mine)
    return output.claim(mine)


def _say_faults(corpus: ShardPlan, console: Console) -> None:
    for line in corpus.left_out:
        console.print(f"left out: {line}", **PLAIN)
    faults = [file.fault for file in corpus.files if file.fault]
    for fault in faults[:MOST_FAULTS]:
        console.print(f"quarantined: {fault.error_type}: {fault.error_message}", **PLAIN)
    if len(faults) > MOST_FAULTS:
        console.print(f"and {len(faults) - MOST_FAULTS} more files", **PLAIN)


def _say_ended(output: OutputFolder, lease: Lease, error: HyclusterError) -> None:
    """Leave word of it in the output, where it is this run's, and a report where somebody has to decide by it."""
    if not lease.held:
        return
    tell_end(output.folder, output.edition(), error.message)
    if isinstance(error, TooManyQuarantined):
        try:
            write_report(output.folder)
        except (OSError, HyclusterError) as away:
            log.debug("no report: %s", masked_line(away))


def _say_done(job: Job, output: OutputFolder, console: Console) -> None:
    console.print(f"{job.name}: already done: {output.folder.masked}", **PLAIN)


def _generate(
    job: Job, corpus: ShardPlan, output: OutputFolder, connect: Connect, earlier: Totals, lease: Lease, console: Console
) -> float:
    """Read, generate and commit all shards that have no record. Returns for how many seconds rows were in work."""
    import ray
    from ray.exceptions import RayTaskError

    from hycluster.batch.stream import stream_records

    progress: Any = ray.remote(num_cpus=0, max_restarts=-1)(JobProgress).remote()
    teller = Teller(output.folder, output.edition(), earlier.rows)
    stream = stream_records(corpus, corpus.in_order(output.done()), job, output, connect, progress)
    seen, begun_at, ended_at = earlier, math.inf, -math.inf
    try:
        with teller, Reporter(job.name, corpus.rows, earlier.rows, _polled(progress, teller), console):
            for record in stream:
                lease.check()
                # What is through between two looks of the reporter was in work, too.
                begun_at, ended_at = min(begun_at, record.begun_at), max(ended_at, record.committed_at)
                seen += _totals(iter([record]))
                check_quarantine(job, corpus, seen)
        return max(0.0, ended_at - begun_at)
    except RayTaskError as error:
        cause = error.cause
        log.debug("the job failed", exc_info=True)
        if isinstance(cause, HyclusterError):
            # Anew: Ray Data has added advice on its own settings to the text of this one.
            raise type(cause)(cause.message) from None
        raise JobFailed(f"{type(cause).__name__}: {masked_line(cause)}") from error
    finally:
        stream.close()
        ray.kill(progress)


def _polled(progress: Any, teller: Teller) -> Callable[[], RunProgress]:
    """Asks how far this run is, and has it told."""
    import ray

    said = RunProgress()

    def so_far() -> RunProgress:
        nonlocal said
        try:
            now: RunProgress = ray.get(progress.total.remote(), timeout=PROGRESS_WITHIN_S)
        except ray.exceptions.RayError:
            # It is away, or all of the cluster is: whether that ends the job is decided elsewhere.
            return said
        said = now
        teller.tell(said)
        return said

    return so_far


def _totals(records: Iterator[ShardRecord]) -> Totals:
    return sum((Totals(r.rows, r.quarantined, r.prompt_tokens, r.completion_tokens) for r in records), Totals())
