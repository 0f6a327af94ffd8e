"""The command line. Parses settings before anything heavy is imported, so ``--help`` is quick."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hycluster import __version__
from hycluster.batch.cli import app as batch_app
from hycluster.chaos.cli import chaos
from hycluster.config import DEFAULT_SETTINGS, load_settings
from hycluster.errors import HyclusterError
from hycluster.k8s.cli import app as k8s_app
from hycluster.models.cli import tiny_model
from hycluster.planning.cli import plan
from hycluster.summarize.cli import summarize

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="hycluster",
    help="Serve large mixture-of-experts models on Ray and vLLM, and run bulk jobs with the same engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(batch_app, name="batch")
app.add_typer(k8s_app, name="k8s")
app.command("summarize")(summarize)
app.command("chaos")(chaos)
app.command("plan")(plan)
app.command("tiny-model")(tiny_model)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; dotted keys; repeatable.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
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
    config: Annotated[Path, typer.Argument(help="Settings file.")] = DEFAULT_SETTINGS,
    http_port: Annotated[
        str | None, typer.Option(metavar="PORT", help="Port of the HTTP door; 0 takes a free one.")
    ] = None,
    grpc_port: Annotated[
        str | None, typer.Option(metavar="PORT", help="Port of the gRPC door; 0 takes a free one.")
    ] = None,
    assignments: SetOption = None,
) -> None:
    """Serve the models of CONFIG in the foreground, on the Ray cluster in RAY_ADDRESS or on one of its own.

    Prints one line beginning "ready" once a request would succeed. SIGTERM or Ctrl-C drains, then exits 0.
    """
    ports = [f"{door}.port={port}" for door, port in (("http", http_port), ("grpc", grpc_port)) if port is not None]
    settings = load_settings(config, [*(assignments or []), *ports])
    stopping = threading.Event()

    begun = time.monotonic()
    typer.echo(f"starting {', '.join(model.name for model in settings.models)} ...", err=True)
    from hycluster.engine.arguments import engine_arguments, model_files
    from hycluster.ingress.ports import check_port

    for model in settings.models:
        engine_arguments(model, model_files(model))
    if not os.environ.get("RAY_ADDRESS"):
        # The doors will be on this machine: better known now than after the engines have started.
        check_port(settings.http.host, settings.http.port, "http.port")
        check_port(settings.grpc.host, settings.grpc.port, "grpc.port")

    import ray

    from hycluster import cluster

    started_ray = cluster.start()
    # After Ray's own handlers, which would end this process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        deployed = cluster.deploy(settings, started_ray=started_ray, stopping=stopping)
        if deployed is not None:
            typer.echo(
                f"ready {deployed.doors.http} grpc {deployed.doors.grpc} ray {deployed.ray}"
                f" models {','.join(model.name for model in settings.models)}"
                f" after {time.monotonic() - begun:.0f} s"
            )
            sys.stdout.flush()
            stopping.wait()
        typer.echo("draining ...", err=True)
        cluster.stop(settings.drain_timeout_s)
        typer.echo("stopped", err=True)
    finally:
        # A cluster of our own ends with this, whatever became of the application.
        ray.shutdown()


@app.command()
def upgrade(
    config: Annotated[Path, typer.Argument(help="Settings file.")] = DEFAULT_SETTINGS,
    assignments: SetOption = None,
) -> None:
    """Replace every replica and every door of the running service, with the settings of CONFIG, under load.

    Acts on the Ray cluster in RAY_ADDRESS or on the last one that was started here. Requests go on meanwhile;
    docs/upgrades.md tells how, and what stays as it was. Ctrl-C ends the waiting, not the upgrade.
    """
    settings = load_settings(config, assignments or [])
    begun = time.monotonic()
    from hycluster.engine.arguments import engine_arguments, model_files

    for model in settings.models:
        engine_arguments(model, model_files(model))

    import ray

    from hycluster import cluster, upgrade
    from hycluster.placement import with_room

    cluster.connect()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        surging = with_room(settings.models, upgrade.free())
        for model in settings.models:
            if model.name not in surging and model.replicas.most == 1 and not model.sleeps:
                typer.echo(
                    f"warning: {model.name}: the cluster has no room for a second replica; this model can't be served"
                    " while its only one is replaced",
                    err=True,
                )
        typer.echo(f"upgrading {', '.join(model.name for model in settings.models)} ...", err=True)
        deployed = upgrade.upgrade(settings, surging, stopping)
        if deployed is None:
            typer.echo("the upgrade goes on; nobody waits for it", err=True)
        else:
            typer.echo(
                f"upgraded {deployed.doors.http} grpc {deployed.doors.grpc} ray {deployed.ray}"
                f" after {time.monotonic() - begun:.0f} s"
            )
    finally:
        ray.shutdown()


def main() -> None:
    """Entry point of the ``hycluster`` command: hycluster's errors become one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        app()
    except HyclusterError as error:
        for line in error.message.splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(error.exit_code)
