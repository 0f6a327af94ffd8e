"""``hycluster status`` and ``hycluster top``: the state of the running service, once or until one has seen enough.

The state is the ingress processes' own word, the same that the page shows. Where none answers, the directory's is told;
what Ray and Ray Serve know of the processes is told beside it in either case.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import INTERRUPTED_EXIT, console, echo

if TYPE_CHECKING:
    from hycluster.serving.ray_state import Look
    from hycluster.state.cluster_state import ClusterState

ANSWER_WITHIN_S = 3.0

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Ray cluster; default: RAY_ADDRESS, or what this HYCLUSTER_HOME has started."
    ),
]


def status(
    address: AddressOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state as JSON, as GET /hycluster/status has it.")
    ] = False,
) -> None:
    """Show which parts of the running service are up, how they are loaded, which are missing, and why.

    Exits 0 when all is well, 1 when something is missing, 2 when no service was found.
    """
    import ray

    from hycluster import cluster

    cluster.join_cluster(address)
    try:
        state, parts, well = _look()
    finally:
        ray.shutdown()
    if as_json:
        echo(json.dumps(state.told()))
    else:
        from hycluster.state.terminal import shown_state

        screen = console()
        screen.print(shown_state(state))
        screen.print()
        for line in parts:
            echo(line)
    raise typer.Exit(0 if well else 1)


def top(
    address: AddressOption = None,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.5, max=60, help="Time between two looks.")] = 2.0,
) -> None:
    """Show the state of the running service on the whole terminal, and keep it fresh until Ctrl-C."""
    if not _on_a_terminal():
        raise SettingsError("top: needs a terminal; 'hycluster status' prints the same once, --json for a program")
    import ray
    from rich.live import Live

    from hycluster import cluster
    from hycluster.state.terminal import shown_state

    cluster.join_cluster(address)
    try:
        with Live(console=console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(shown_state(_look()[0]), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT) from None
    finally:
        ray.shutdown()


def _on_a_terminal() -> bool:
    return sys.stdout.isatty()


def _look() -> tuple[ClusterState, list[str], bool]:
    """The state, a line for each part that Ray knows of, and whether all is well.

    Raises:
        SettingsError: nothing runs here.
    """
    from hycluster.app import APP_NAME
    from hycluster.directory.directory import SHARED_DIRECTORY
    from hycluster.serving import ray_state
    from hycluster.serving.status import status_lines

    look = ray_state.look(APP_NAME, SHARED_DIRECTORY)
    lines, well = status_lines(look)
    state = _state(look)
    # Pools are told with their replicas.
    return state, [line for line in lines if not line.startswith("model ")], well and state.state == "ready"


def _state(look: Look) -> ClusterState:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from hycluster import __version__
    from hycluster.app import APP_NAME
    from hycluster.directory.directory import Survey, find_directory
    from hycluster.state.cluster_state import cluster_state, health_of

    if any(process.deployment == "ingress" for process in look.processes.values()):
        try:
            asked: Any = serve.get_app_handle(APP_NAME).cluster_state.remote()
            found: ClusterState = asked.result(timeout_s=ANSWER_WITHIN_S)
        except (RayServeException, ray.exceptions.RayError, TimeoutError):
            pass
        else:
            return found
    survey = Survey()
    if look.overview is not None:
        try:
            directory: Any = find_directory()
            survey = ray.get(directory.survey.remote(), timeout=ANSWER_WITHIN_S)
        except (ValueError, ray.exceptions.RayError, TimeoutError):
            # It has gone between two looks; the lines of the parts say so.
            pass
    return cluster_state(survey, health_of(survey), version=__version__, open_here=bool(survey.ingresses))
