"""``hycluster batch``: bulk runs over Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hycluster.config import DEFAULT_SETTINGS, load_settings
from hycluster.errors import HyclusterError

app = typer.Typer(name="batch", help="Bulk runs over Parquet.", no_args_is_help=True)


@app.callback()
def batch() -> None:
    """Bulk runs over Parquet."""


@app.command()
def run(
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="Job file, such as jobs/summarize.yaml.")],
    input_path: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Parquet file, folder, glob or s3:// URI.")
    ] = None,
    output_path: Annotated[
        str | None, typer.Option("--output", metavar="PATH", help="Folder or s3:// URI for the results.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="shared|dedicated", help="Use the running cluster, or start engines for this job."),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: sampling.max_tokens=8.")
    ] = None,
    config: Annotated[Path, typer.Option(help="Deployment, for dedicated engines.")] = DEFAULT_SETTINGS,
) -> None:
    """Run a job, or resume it: the same command goes on where it stopped.

    Exit codes: 0 committed; 1 failed, run it again; 2 settings or input refused; 3 too many rows quarantined.
    """
    # Settings first: they are checked in a moment, Ray takes seconds to import.
    try:
        from hycluster.batch.job import load_job

        job = load_job(job_file, assignments or (), input_path=input_path, output_path=output_path, engine=engine)
        settings = load_settings(config) if job.engine == "dedicated" else None

        from hycluster.batch.run import run_job

        run_job(job, settings=settings)
    except HyclusterError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(1) from None
