"""The command line. Parses settings before anything heavy is imported, so ``--help`` is quick."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hycluster import __version__, aside
from hycluster.batch import cli as batch
from hycluster.batch.job import Job
from hycluster.chaos.cli import chaos
from hycluster.consent import Yes, ask
from hycluster.doctor.cli import doctor
from hycluster.errors import HyclusterError, NotFound, PermissionDenied, SettingsError, Unauthenticated, shown
from hycluster.job_engines import open_engines
from hycluster.k8s.cli import app as k8s_app
from hycluster.models.cli import tiny_model
from hycluster.monitoring.cli import app as metrics_app
from hycluster.planning.asked import asked_settings
from hycluster.planning.cli import plan
from hycluster.serving.running import choose
from hycluster.settings.cli import app as settings_app
from hycluster.settings.observe import LEVELS
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.settings.settings import Settings
from hycluster.simulate.cli import simulate
from hycluster.submit.cli import cancel, jobs, logs, show_submitted, submit
from hycluster.summarize.cli import summarize
from hycluster.tenants.keys import keys_app
from hycluster.tenants.limits import limits_app
from hycluster.tenants.projects import projects_app
from hycluster.tenants.usage import print_usage
from hycluster.terminal import INTERRUPTED_EXIT, PrintableFormatter, echo
from hycluster.top import AddressOption, status, top
from hycluster.why import why


class Commands(TyperGroup):
    """Ctrl-C ends a command with a word and the exit code that shells have for it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("stopped by Ctrl-C before it was done", err=True)
            raise typer.Exit(INTERRUPTED_EXIT) from None


app = typer.Typer(
    name="hycluster",
    cls=Commands,
    help="Serve large mixture-of-experts models on Ray and vLLM, and run bulk jobs with the same engines.",
    no_args_is_help=True,
    # Inherited by every command.
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
batch_app = typer.Typer(
    name="batch",
    help="Run bulk jobs over Parquet files, here or on a cluster elsewhere; follow and verify them.",
    no_args_is_help=True,
    context_settings={"obj": batch.Outside(open_engines, show_submitted)},
)
BATCH: dict[str, Callable[..., None]] = {
    "run": batch.run,
    "status": batch.job_status,
    "verify": batch.verify,
    "report": batch.report,
    "submit": submit,
    "jobs": jobs,
    "logs": logs,
    "cancel": cancel,
}
for name, command in BATCH.items():
    batch_app.command(name)(command)
app.add_typer(batch_app)
app.add_typer(k8s_app, name="k8s")
app.add_typer(keys_app, name="keys")
app.add_typer(limits_app, name="limits")
app.add_typer(projects_app, name="projects")
app.add_typer(metrics_app, name="metrics")
# What a job is made of is above the settings' room.
app.add_typer(settings_app, name="settings", context_settings={"obj": Job})
app.command("usage")(print_usage)
app.command("summarize")(summarize)
app.command("chaos")(chaos)
app.command("plan")(plan)
app.command("simulate")(simulate)
app.command("tiny-model")(tiny_model)
app.command("why")(why)
app.command("status")(status)
app.command("top")(top)
app.command("doctor")(doctor)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as models.0.replicas.min=2; repeatable."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve large mixture-of-experts models on Ray and vLLM, and run bulk jobs with the same engines."""


@app.command()
def serve(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG|MODEL]",
            help="Settings file; or a model's folder or hub id (org/name), with settings for the hardware that is here."
            f" Default: {DEFAULT_SETTINGS}, or the embedded model.",
        ),
    ] = None,
    http_port: Annotated[
        str | None, typer.Option(metavar="PORT", help="Port of the HTTP ingress; 0 takes a free one.")
    ] = None,
    grpc_port: Annotated[
        str | None, typer.Option(metavar="PORT", help="Port of the gRPC ingress; 0 takes a free one.")
    ] = None,
    assignments: SetOption = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="As logs.level in CONFIG: debug, info, warning or error. Of the logs in the folder that is printed"
            " at the start; the terminal shows the same.",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With a MODEL: write the settings that were made for it.")
    ] = None,
) -> None:
    """Serve the models of CONFIG, or a MODEL, in the foreground, on the Ray cluster in RAY_ADDRESS or one of its own.

    Prints one line beginning "ready" once a request would succeed, and on standard error a line for whatever is lost
    and for its return. SIGTERM or Ctrl-C drains, then exits 0; Ctrl-C before that line, or once more, exits 130. Exits
    4 if Ray itself is lost: start it again.
    """
    ports = [
        f"{ingress}.port={port}" for ingress, port in (("http", http_port), ("grpc", grpc_port)) if port is not None
    ]
    if log_level is not None and log_level not in LEVELS:
        raise SettingsError(f"--log-level: {shown(log_level)} is not allowed; must be one of {', '.join(LEVELS)}")
    level = [f"logs.level={log_level}"] if log_level is not None else []
    settings = asked_settings(what, [*(assignments or []), *ports, *level], save, say)
    stopping = threading.Event()

    begun = time.monotonic()
    echo(f"starting {', '.join(model.name for model in settings.models)} ...", err=True)
    from hycluster.ingress.ports import check_port

    _check_models(settings)
    if not os.environ.get("RAY_ADDRESS"):
        # The ingress processes will be on this machine: better known now than after the engines have started.
        check_port(settings.http.host, settings.http.port, "http.port")
        check_port(settings.grpc.host, settings.grpc.port, "grpc.port")
        if settings.auth.tls is not None:
            from hycluster.ingress.tls import check_files

            check_files(settings.auth.tls)

    database: str | None = None
    if settings.auth.enabled and settings.auth.keys:
        from hycluster.auth.database import database_url, prepare_database

        database = database_url(settings.auth)
        if prepare_database(settings.auth):
            say("the database of keys is now of this version")

    import ray

    from hycluster import cluster
    from hycluster import logs as log_files
    from hycluster.serving import deploy, running
    from hycluster.serving.service import Service

    started_ray = cluster.start()
    say(f"logs in {log_files.folder()}")
    say(f"{'started' if started_ray else 'joined'} Ray after {time.monotonic() - begun:.1f} s")
    running.remember_service([model.name for model in settings.models], database, _shown_ledger(settings))

    asked_by: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked_by.append(number)
        stopping.set()

    # After Ray's own handlers, which would end this process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = ray.get_runtime_context().gcs_address
    service = Service(settings, say, own=started_ray)
    try:
        opened = deploy.deploy(settings, service, started_ray=started_ray, stopping=stopping)
        if opened is not None:
            echo(
                f"ready {opened.ingresses.http} grpc {opened.ingresses.grpc} ray {address} models"
                f" {','.join(opened.models)}"
                f" after {time.monotonic() - begun:.0f} s"
            )
            sys.stdout.flush()
            service.attend(stopping)
        say("draining ... (Ctrl-C again cuts off what is in flight)")
        deploy.stop(settings.drain_timeout_s)
        if opened is None and asked_by[0] == signal.SIGINT:
            say("stopped by Ctrl-C before it was ready")
            raise typer.Exit(INTERRUPTED_EXIT)
        say("stopped")
    except KeyboardInterrupt:
        say("stopped at once; the requests that were in flight are lost")
        raise typer.Exit(INTERRUPTED_EXIT) from None
    finally:
        service.close()
        # A cluster of our own ends with this, whatever became of the application.
        running.forget()
        ray.shutdown()


def _shown_ledger(settings: Settings) -> str | None:
    """Where the service's ledger is; empty if it is off, None if that holds a secret."""
    from hycluster.storage import masked

    place = settings.ledger_place
    if not settings.keeps_ledger:
        return ""
    if masked(place) != place:
        return None
    return place if "://" in place else str(Path(place).absolute())


def _check_models(settings: Settings) -> None:
    """Refuse what no engine could start with, before anything starts."""
    from hycluster.engine.arguments import engine_arguments, model_files
    from hycluster.engine.names import check_names
    from hycluster.settings.api import check_environment

    check_environment(os.environ)
    for model in settings.models:
        check_names(model)
        engine_arguments(model, model_files(model))


def _key_given() -> str:
    from hycluster.client import KEY_VARIABLE

    given = "set" if os.environ.get(KEY_VARIABLE) else "not set"
    return f"error: commands give the key that the variable {KEY_VARIABLE} holds, which is {given}"


def say(line: str) -> None:
    """A line for whoever runs the command."""
    echo(line, err=True)


@app.command()
def upgrade(
    config: Annotated[
        Path | None, typer.Argument(help=f"Settings file; default: {DEFAULT_SETTINGS}, or the embedded model.")
    ] = None,
    assignments: SetOption = None,
    address: AddressOption = None,
    yes: Yes = False,
) -> None:
    """Replace every replica and every ingress process of the running service, with the settings of CONFIG, under load.

    Says which service that is, and asks. Requests go on meanwhile; docs/upgrades.md tells how, and what stays as it
    was. Ctrl-C ends the waiting, not the upgrade.
    """
    settings = load_settings(config, assignments or [])
    # Before anything is looked at: whose cluster it is.
    choose(address)
    begun = time.monotonic()
    _check_models(settings)

    import ray

    from hycluster import cluster, upgrade
    from hycluster.replica.placement import with_room
    from hycluster.serving import running_service

    found = running_service.find_service(cluster.join_cluster(address))
    try:
        names = ", ".join(model.name for model in settings.models)
        of = f"{config} ({names})" if config is not None else names
        ask(
            f"{found}\nevery replica and every ingress process of it is replaced, by the settings of {of}",
            yes=yes,
        )
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        surging = with_room(settings.models, upgrade.free())
        for model in settings.models:
            if model.name not in surging and model.replicas.most == 1 and not model.sleeps:
                echo(
                    f"warning: {model.name}: the cluster has no room for a second replica; this model can't be served"
                    " while its only one is replaced",
                    err=True,
                )
        echo(f"upgrading {', '.join(model.name for model in settings.models)} ...", err=True)
        deployed = upgrade.roll_out(settings, surging, stopping)
        if deployed is None:
            echo("the upgrade goes on; this command no longer waits for it", err=True)
        else:
            echo(
                f"upgraded {deployed.ingresses.http} grpc {deployed.ingresses.grpc} ray {deployed.ray}"
                f" after {time.monotonic() - begun:.0f} s"
            )
    finally:
        ray.shutdown()


# What one begins with is listed first.
app.registered_commands.sort(key=lambda command: command.callback not in (serve, status, top, doctor, upgrade))


# Commands that only look at something, time and again.
QUICK = (["status"], ["top"], ["why"])


def main() -> None:
    """Entry point of the ``hycluster`` command: hycluster's errors become one line and an exit code."""
    lines = logging.StreamHandler()
    lines.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    aside.in_a_command(say, quick=sys.argv[1:2] in QUICK)
    try:
        app()
    except HyclusterError as error:
        for line in error.message.splitlines():
            echo(f"error: {line}", err=True)
        if not isinstance(error, NotFound | SettingsError):
            aside.tell_place(say)
        # What an ingress says is of headers and metadata, for which a command has no option. What is said of Ray's own
        # token (RAY_AUTH_TOKEN) has nothing to do with it.
        if isinstance(error, Unauthenticated | PermissionDenied) and not error.message.startswith("RAY_"):
            echo(_key_given(), err=True)
        sys.exit(error.exit_code)
