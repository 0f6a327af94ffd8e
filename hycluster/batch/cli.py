"""``hycluster batch``: bulk runs over Parquet. ``hycluster/cli.py`` adds what is asked of clusters elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from hycluster.consent import Yes, ask
from hycluster.errors import HyclusterError, SettingsError
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.terminal import INTERRUPTED_EXIT, echo

if TYPE_CHECKING:
    from hycluster.batch.job import Job
    from hycluster.batch.task import Connect
    from hycluster.settings.settings import Settings


class OpenEngines(Protocol):
    """Opens what a job generates with; ``settings`` are those of the deployment, for engines of its own."""

    def __call__(self, job: Job, settings: Settings | None, address: str | None) -> AbstractContextManager[Connect]: ...


class ShowSubmitted(Protocol):
    """Prints what became of a submitted job; returns the exit code."""

    def __call__(self, job_id: str, address: str, *, follow: bool, as_json: bool) -> int: ...


@dataclass(frozen=True, slots=True)
class Outside:
    """What the commands need of folders that this one does not know; the context's ``obj``."""

    open_engines: OpenEngines
    show_submitted: ShowSubmitted


def run(
    context: typer.Context,
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="Job file, such as jobs/summarize.yaml.")],
    input_path: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Parquet file, folder, glob or s3:// URI.")
    ] = None,
    output_path: Annotated[
        str | None, typer.Option("--output", metavar="PATH", help="Folder or s3:// URI for the results.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="shared|dedicated", help="shared: the running cluster's engines; dedicated: engines for this job."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: sampling.max_tokens=8.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help=f"Settings file for dedicated engines; default: {DEFAULT_SETTINGS}, or the embedded model."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Ray cluster; default: RAY_ADDRESS, or what this HYCLUSTER_HOME has started."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the output if it is another job's or another input's; asks.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Run a job, or resume it: the same command goes on where it stopped.

    Exit codes: 0 committed; 1 failed, run it again; 2 settings or input refused; 3 too many rows quarantined; 130
    stopped by Ctrl-C.
    """
    # Settings first: they are checked in a moment, Ray takes seconds to import.
    job: Job | None = None
    try:
        from hycluster.batch.job import load_job

        job = load_job(job_file, assignments or (), input_path=input_path, output_path=output_path, engine=engine)
        settings = load_settings(config) if job.engine == "dedicated" else None

        from hycluster.batch.run import run_job

        outside: Outside = context.obj
        run_job(
            job,
            engines=partial(outside.open_engines, settings=settings, address=address),
            overwrite=overwrite,
            consent=partial(ask, yes=yes),
        )
    except HyclusterError as error:
        for line in error.message.splitlines():
            echo(f"error: {line}", err=True)
        raise typer.Exit(error.exit_code) from None
    except SystemExit:
        # What Ray makes of SIGTERM, by which it cancels a job.
        echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        echo(_stopped(job) if job is not None else "stopped; nothing had begun", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from None


def _stopped(job: Job) -> str:
    """What there is of a job that was stopped, and what is lost."""
    from hycluster.batch.progress.status import Watcher
    from hycluster.storage import locate

    try:
        status = Watcher(locate(job.output.path, "output.path")).look()
    except (HyclusterError, OSError):
        return "stopped; nothing was committed and nothing is lost, the same command begins anew"
    more = status.rows_through - status.done.rows
    return (
        f"stopped; {status.done.rows} of {status.rows} rows are committed, {more} more were answered: those of the last"
        " half minute, and what was in flight, are lost and will be asked for again; the same command goes on from here"
    )


def verify(
    output_path: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3:// URI of a finished job.")],
    input_path: Annotated[str, typer.Option("--input", metavar="PATH", help="The input that the job ran on.")],
) -> None:
    """Prove from the files alone that every input row is exactly once in the output or the quarantine.

    Exit codes: 0 it is so; 1 it is not, with a line for each thing that is wrong; 2 there is no such output or input.
    """
    with _one_line_errors():
        from hycluster.batch.output.verify import verify_output
        from hycluster.storage import locate

        verdict = verify_output(locate(output_path, "OUTPUT"), locate(input_path, "input.path"))
    for line in verdict.lines():
        echo(line)
    raise typer.Exit(1 if verdict.fault_count else 0)


def job_status(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="OUTPUT|JOB_ID", help="Folder or s3:// URI of a job; with --address a job's id.")
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Ray's dashboard on the cluster that the job was submitted to.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep looking until the job is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each look.")] = False,
) -> None:
    """Show how far a job is, from the files of its output alone. Works from any machine.

    With --address: what became of a submitted job. The exit code is then the job's, 0 while it runs.
    """
    with _one_line_errors():
        if address is not None:
            outside: Outside = context.obj
            raise typer.Exit(outside.show_submitted(subject, address, follow=follow, as_json=as_json))
        from hycluster.batch.progress.status import show_status
        from hycluster.storage import locate

        show_status(locate(subject, "OUTPUT"), follow=follow, as_json=as_json)


def report(
    output_path: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3:// URI of a job.")],
) -> None:
    """Write _report.html and _report.json into an output, of what is committed there. A finished job has them."""
    with _one_line_errors():
        from hycluster.batch.progress.figures import REPORT_HTML, write_report
        from hycluster.storage import locate

        written = write_report(locate(output_path, "OUTPUT"))
    echo(f"{written['output']}/{REPORT_HTML}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except HyclusterError as error:
        echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        # A store that does not answer, a folder that may not be read: at any of many reads.
        from hycluster.storage import masked_line

        echo(f"error: OUTPUT: can't be read: {masked_line(error)}", err=True)
        raise typer.Exit(SettingsError.exit_code) from None
