"""``hycluster batch submit``, and what is asked of a cluster elsewhere about the jobs that it was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hycluster.consent import Yes, ask
from hycluster.errors import SettingsError
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.submit.target import KubernetesTarget
from hycluster.terminal import INTERRUPTED_EXIT, echo

if TYPE_CHECKING:
    from hycluster.batch.job import Job
    from hycluster.settings.settings import Settings
    from hycluster.submit.submission import Submission
    from hycluster.submit.submitted import Submitted

KUBERNETES = "On Kubernetes"
Address = Annotated[str, typer.Option(metavar="URL", help="Ray's dashboard on that cluster, http://HOST:8265.")]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="What 'batch submit' printed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="Job file, such as jobs/summarize.yaml.")],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Ray's dashboard on the cluster, http://HOST:8265.")
    ] = None,
    input_path: Annotated[
        str | None,
        typer.Option("--input", metavar="PATH", help="Parquet as the cluster's nodes see it: s3:// URI."),
    ] = None,
    output_path: Annotated[
        str | None, typer.Option("--output", metavar="PATH", help="Where they write the results: s3:// URI.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="shared|dedicated", help="shared: the engines that serve there; dedicated: engines for this job."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: sampling.max_tokens=8.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Settings file for dedicated engines; sent along with the job."
            f" Default: {DEFAULT_SETTINGS}, or the embedded model."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the output if it is another job's or another input's; asks.")
    ] = False,
    yes: Yes = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job's log and exit with its exit code.")
    ] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="As a RayJob, by kubectl apply.", rich_help_panel=KUBERNETES)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the RayJob instead.", rich_help_panel=KUBERNETES)
    ] = False,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Namespace of the RayJob.", rich_help_panel=KUBERNETES)
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="RayCluster to run in; default: a cluster for this job.", rich_help_panel=KUBERNETES
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="RayJob or RayCluster whose cluster spec it takes; - is standard input.",
            rich_help_panel=KUBERNETES,
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="Image of the job's cluster; must contain hycluster.", rich_help_panel=KUBERNETES
        ),
    ] = None,
) -> None:
    """Give a job to a cluster elsewhere, and print its id. The job is checked here first.

    The same command again resumes a job that failed or was cancelled.
    Exit codes: 0 submitted; 1 the cluster did not take it; 2 refused here. With --wait those of 'batch run'.
    """
    from hycluster.batch.job import load_job
    from hycluster.storage import masked
    from hycluster.submit.submission import submission

    target = KubernetesTarget(dry_run, namespace, cluster, template, image)
    if not kubernetes:
        target.check_unused()
    elif wait:
        raise SettingsError("--wait: not allowed with --kubernetes; 'kubectl get rayjob JOB_ID --watch' does it")
    if kubernetes == (address is not None):
        raise SettingsError("--address: give either Ray's dashboard, such as http://HOST:8265, or --kubernetes")
    job = load_job(job_file, assignments or (), input_path=input_path, output_path=output_path, engine=engine)
    if kubernetes:
        job = _on_engines_of(target, job)
    settings = load_settings(config) if job.engine == "dedicated" else None
    if overwrite and not dry_run:
        # There is nobody to ask where the job runs.
        ask(f"--overwrite: {masked(job.output.path)} is deleted if it is the output of another job or input", yes=yes)
    sent = submission(job, settings, overwrite=overwrite)
    for note in sent.notes:
        _note(note)
    if address is not None:
        raise typer.Exit(_to_ray(sent, address, wait))
    _to_kubernetes(sent, job, settings, target)


def jobs(address: Address, as_json: AsJson = False) -> None:
    """List the batch jobs that were submitted to a cluster, the newest first."""
    from hycluster.submit.job_api import JobApi

    found = JobApi(address).jobs()
    if as_json:
        echo(json.dumps([job.to_dict() for job in found]))
        return
    rows = [("JOB_ID", "STATE", "STARTED", "FOR", "OUTPUT")]
    rows += [(job.id, job.state, job.started, job.took, job.output or "") for job in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the job has ended.")] = False,
) -> None:
    """Print what a submitted job has printed. With --follow the exit code is the job's."""
    from hycluster.submit.job_api import JobApi

    api = JobApi(address)
    if follow:
        raise typer.Exit(api.follow(job_id, lambda text: echo(text, nl=False)).exit_code)
    echo(api.log(job_id), nl=False)


def cancel(job_id: JobId, address: Address, yes: Yes = False) -> None:
    """Stop a submitted job. What it has committed stays; the same submit goes on from there.

    Says which job that is, and asks.
    """
    from hycluster.submit.job_api import JobApi

    api = JobApi(address)
    if not (job := api.look(job_id)).ended:
        since = f" since {job.started}" if job.started else ""
        output = f", writes to {job.output}" if job.output else ""
        ask(f"{job_id} at {address}, {job.state}{since}{output}: it is stopped", yes=yes)
    stopped, now = api.cancel(job_id)
    if not stopped:
        echo(f"{job_id} had ended: {now.meaning}")
    elif now.ended:
        echo(f"{job_id}: {now.meaning}")
    else:
        echo(f"error: {job_id} was told to stop and still runs; look again with 'batch status'", err=True)
        raise typer.Exit(1)


def show_submitted(job_id: str, address: str, *, follow: bool, as_json: bool) -> int:
    """``batch status`` of a submitted job; ``follow`` says each new state until the job has ended.

    Returns:
        The exit code: the job's own, 0 while nothing is wrong.
    """
    from hycluster.submit.job_api import JobApi

    api = JobApi(address)

    def say(job: Submitted) -> None:
        if as_json:
            echo(json.dumps(job.to_dict()))
        elif follow:
            echo(f"{job.id}: {job.meaning}" + (f" ({job.reason})" if job.reason else ""))
        else:
            cells = job.cells()
            if job.state == "running" and (said := _last_line(api.log(job_id))):
                cells.append(("says", said))
            for label, value in cells:
                echo(f"{label:8} {value}")

    if follow:
        return api.wait(job_id, say).exit_code
    now = api.look(job_id)
    say(now)
    return now.exit_code


def _on_engines_of(target: KubernetesTarget, job: Job) -> Job:
    """The job, with engines that it finds or starts where it is to run."""
    if target.cluster is not None or job.engine == "dedicated":
        return job
    if "engine" in job.model_fields_set:
        raise SettingsError(
            "engine: 'shared' is not allowed in a cluster of the job's own; give --cluster NAME of one that serves"
            " ('kubectl get raycluster' lists them), or --engine dedicated"
        )
    _note("engine: not set; a cluster of the job's own serves nothing, so 'dedicated'")
    return job.model_copy(update={"engine": "dedicated"})


def _to_kubernetes(sent: Submission, job: Job, settings: Settings | None, target: KubernetesTarget) -> None:
    from hycluster.settings.as_yaml import as_yaml
    from hycluster.submit.rayjob import apply, ray_job

    manifest, notes = ray_job(sent, job, settings, target)
    for note in notes:
        _note(note)
    if target.dry_run:
        echo(as_yaml(manifest), nl=False)
        return
    apply(manifest)
    echo(sent.id)
    where = f" -n {target.namespace}" if target.namespace else ""
    _note(
        f"'kubectl get{where} rayjob {sent.id} --watch' shows it, 'kubectl delete{where} rayjob {sent.id}' cancels it"
    )


def _to_ray(sent: Submission, address: str, wait: bool) -> int:
    from hycluster.submit.job_api import JobApi

    api = JobApi(address)
    api.submit(sent)
    echo(sent.id)
    if not wait:
        _note(f"hycluster batch status|logs|cancel {sent.id} --address {address}")
        return 0
    try:
        ended = api.follow(sent.id, lambda text: echo(text, nl=False, err=True))
    except KeyboardInterrupt:
        _note(f"the job goes on; hycluster batch cancel {sent.id} --address {address} stops it")
        return INTERRUPTED_EXIT
    _note(f"{sent.id}: {ended.meaning}")
    return ended.exit_code


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def _note(text: str) -> None:
    echo(f"note: {text}", err=True)
