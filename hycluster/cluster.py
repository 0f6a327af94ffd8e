"""The Ray cluster around it all: join it or start one, deploy, wait until a request would succeed, stop.

Also the pool of a batch job's own (``dedicated``): the same replicas as plain actors, without doors.

Pinned to Ray 2.60.0: ``enable_token_auth_by_default`` is Ray's own and private.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.serve.exceptions import RayServeException
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hycluster.app import APP_NAME, application
from hycluster.directory.directory import NAMESPACE, SHARED_DIRECTORY, open_directory
from hycluster.directory.starts import CONTROLLER_OPTIONS
from hycluster.engine.scratch import sweep
from hycluster.errors import EngineStartFailed, HyclusterError, SettingsError, one_line, reported
from hycluster.memory import MONITOR_VARIABLE, MemoryGuard
from hycluster.replica.placement import actor_options, bundles, on_gpus, reserved, strategy
from hycluster.replica.rank import Patience
from hycluster.replica.replica import Replica
from hycluster.serving import running_service
from hycluster.serving.capacity import check_places
from hycluster.serving.running import Chosen, choose, remember, started_here
from hycluster.serving.service import Opened, Service
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.spread import door_nodes, doors_per_node

logger = logging.getLogger(__name__)

GIB = 1 << 30
START_ATTEMPTS = 3
_TIMED_OUT = "timed out during startup"


def connect(address: str | None = None) -> Chosen:
    """Join the Ray cluster at ``address``, in ``RAY_ADDRESS``, or the one that ``hycluster serve`` started here.

    Never whatever Ray finds on this machine. One that this process has joined already stays.

    Raises:
        SettingsError: there is none, there are several, or it does not answer.
    """
    if ray.is_initialized():
        return Chosen(ray.get_runtime_context().gcs_address, "this process", None)
    chosen = choose(address)
    _quiet()
    if chosen.started:
        # As ``ray.init`` does by itself for a cluster that it starts, but not for one that is named.
        enable_token_auth_by_default()
    # Ray's C++ prints an error line for each of Ray Data's actors that is none.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        _check_reachable(chosen.address)
        ray.init(address=chosen.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(f"{chosen.said_by}: no Ray cluster at {chosen.address!r}: {one_line(error)}") from None
    return chosen


def _check_reachable(address: str) -> None:
    """Ray itself tries an address at which nobody listens for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _quiet() -> None:
    """Ray's own notices are for Ray's developers; its log files keep them all."""
    for name in ("ray", "ray.serve", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start(*, remembered: bool = True) -> bool:
    """Join the cluster in ``RAY_ADDRESS``, or start one on this machine.

    Args:
        remembered: other commands of this home find the one that was started.

    Returns:
        Whether one was started; it ends with this process. Ray listens on the machine's own address whatever
        one asks for; a token that it keeps in the user's home keeps others out.
    """
    if os.environ.get("RAY_ADDRESS"):
        connect()
        return False
    _quiet()
    # Ray gives its workers a nice value of 15; engines and doors are what this machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's monitor kills the directory and Serve's controller for what others have; a guard of ours is in its place.
    os.environ.setdefault(MONITOR_VARIABLE, "0")
    _start_node()
    for process in psutil.Process().children():
        if process.name() == "raylet":
            MemoryGuard(process, tell=logger.warning).start()
    if remembered:
        remember(ray.get_runtime_context().gcs_address)
    return True


def _start_node() -> None:
    """Ray gives its own processes 30 s to start, whatever one asks for; on a busy machine that may not do."""
    others = psutil.Process().children(recursive=True)
    for left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no class of its own for it.
            if not left or _TIMED_OUT not in str(error):
                raise
            logger.warning("Ray's processes did not start within 30 s; once more")
            ray.shutdown()
            for process in psutil.Process().children(recursive=True):
                if process not in others:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def check_resources(models: tuple[Model, ...]) -> None:
    """Refuse settings that this cluster can't hold, before anything starts. Counts what is to be there at first.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    there = ray.cluster_resources()
    wanted = {
        resource: sum(reserved(m).get(resource, 0.0) * m.replicas.count for m in models)
        for resource in ("CPU", "GPU", "memory")
    }
    for resource, field, unit in (
        ("CPU", "hardware.cpus", 1),
        ("GPU", "hardware.accelerator", 1),
        ("memory", "hardware.memory_gib", GIB),
    ):
        if wanted[resource] > there.get(resource, 0.0):
            raise SettingsError(
                f"models: {field}: all replicas together ask for {wanted[resource] / unit:g} {resource}"
                f"{' GiB' if unit == GIB else 's'}; this Ray cluster has {there.get(resource, 0.0) / unit:g}"
            )
    for model in models:
        accelerator = model.hardware.accelerator
        if model.replicas.count and on_gpus(model) and f"accelerator_type:{accelerator}" not in there:
            kinds = sorted(name.split(":", 1)[1] for name in there if name.startswith("accelerator_type:"))
            raise SettingsError(
                f"models: {model.name}: hardware.accelerator: {accelerator!r} is not in this Ray cluster;"
                f" there are {kinds or 'none'}"
            )
    check_places(models, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_doors(settings: Settings) -> None:
    """Refuse doors that this cluster has no place for.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    there = ray.cluster_resources()
    for resource, amount in settings.door_resources.items():
        if settings.doors * amount > there.get(resource, 0.0):
            raise SettingsError(
                f"door_resources: {resource}: all doors together ask for {settings.doors * amount:g};"
                f" this Ray cluster has {there.get(resource, 0.0):g}"
            )
    nodes = door_nodes(settings)
    if (most := doors_per_node(settings, nodes)) is not None and nodes * most < settings.doors:
        # Not refused: nodes may come late.
        logger.warning(
            "doors_per_node: %d on each of the %d nodes that can hold doors; %d of %d doors wait for a node",
            most, nodes, settings.doors - nodes * most, settings.doors,
        )  # fmt: skip


def check_batches(settings: Settings) -> None:
    """Refuse a Batch API whose process no node has a place for.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    if settings.batches is None:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, amount in settings.batches.resources.items():
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if amount > most:
            raise SettingsError(
                f"batches.resources: {resource}: {amount:g} is not to be had; the node of this Ray cluster that has"
                f" most of it has {most:g}"
            )


def deploy(settings: Settings, service: Service, *, started_ray: bool, stopping: threading.Event) -> Opened | None:
    """Start the application and wait until a request would succeed, or until ``stopping`` is set: then None.

    Args:
        service: looks after it.
        started_ray: whether this process started the Ray cluster; one that it joined is left as it was found.

    Raises:
        SettingsError, EngineStartFailed: nothing can be served; one line says why.
    """
    check_resources(settings.models)
    check_doors(settings)
    check_batches(settings)
    if running_service.there_is_one():
        found = running_service.find(Chosen(ray.get_runtime_context().gcs_address, "RAY_ADDRESS", None))
        raise SettingsError(
            "RAY_ADDRESS: a hycluster is running in this Ray cluster already; stop it first,"
            f" or give it these settings by 'hycluster upgrade':\n{found}"
        )
    # Serve's proxies share their ports with whoever asks for it, and would take callers from the doors.
    serve.start(proxy_location="Disabled", controller_options=CONTROLLER_OPTIONS)
    serve.run_many(
        [serve.RunTarget(application(settings), name=APP_NAME, route_prefix=None)],
        wait_for_applications_running=False,
    )
    try:
        return service.wait_until_open(stopping)
    except (HyclusterError, ray.exceptions.RayError) as error:
        if not started_ray:
            stop(drain_timeout_s=0)
        raise (error if isinstance(error, HyclusterError) else _failure(str(error))) from None


def _failure(report: str) -> HyclusterError:
    """The error that an engine or a door ended with, out of what Ray says about it."""
    return reported(report) or EngineStartFailed(one_line(report))


def stop(drain_timeout_s: float) -> None:
    """Drain the doors and the replicas and remove the application, if there is one."""
    try:
        serve.delete(APP_NAME, _blocking=False)
    except RayServeException:
        return
    with contextlib.suppress(ValueError):
        ray.get_actor(SHARED_DIRECTORY, namespace=NAMESPACE).close.remote()
    deadline = time.monotonic() + drain_timeout_s + 30
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)
    if not serve.status().applications:
        # All that Serve runs there, for whomever.
        serve.shutdown()
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(SHARED_DIRECTORY, namespace=NAMESPACE))
    sweep()


def join_or_start(address: str | None = None) -> Chosen | None:
    """Join the Ray cluster that is named or that this home has started, or start one that ends with this process: None.

    Raises:
        SettingsError: as :func:`connect`.
    """
    if ray.is_initialized() or address or os.environ.get("RAY_ADDRESS") or started_here():
        return connect(address)
    # Another job that found it would end with this one.
    start(remembered=False)
    return None


@contextlib.contextmanager
def dedicated_pool(settings: Settings, model_name: str) -> Iterator[str]:
    """Engines of a batch job's own; yields the name of their directory, stops them at the end.

    In the Ray cluster that this process has joined; see :func:`join_or_start`.

    Raises:
        SettingsError: no such model, or the cluster is too small.
        EngineStartFailed: an engine could not start.
    """
    model = settings.model(model_name)
    check_resources((model,))
    name = f"{SHARED_DIRECTORY}-{secrets.token_hex(6)}"
    directory = open_directory(name)
    groups = [_placement_group(model) for _ in range(max(1, model.replicas.count))]
    actors: list[Any] = [
        ray.remote(Replica)
        .options(**actor_options(model), **_in_first_bundle(group))
        .remote(model, settings.data_plane, name, Patience(settings.drain_timeout_s, settings.hand_over_after_s))
        for group in groups
    ]
    try:
        _wait_until_ready(actors, model, settings.start_timeout_s)
        yield name
    finally:
        for actor in actors:
            ray.kill(actor)
        for group in groups:
            if group is not None:
                remove_placement_group(group)
        ray.kill(directory)
        sweep()


def _placement_group(model: Model) -> PlacementGroup | None:
    """What Serve makes for a replica of its own; None if one actor is all there is to place."""
    reservations = bundles(model)
    return placement_group(reservations, strategy=strategy(model)) if reservations else None


def _in_first_bundle(group: PlacementGroup | None) -> dict[str, Any]:
    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)}


def _wait_until_ready(actors: list[Any], model: Model, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    starting = [actor.ready.remote() for actor in actors]
    while starting:
        started, starting = ray.wait(starting, timeout=15)
        try:
            ray.get(started)
        except ray.exceptions.RayError as error:
            raise _failure(str(error)) from None
        free, wanted = ray.available_resources().get("CPU", 0.0), reserved(model)["CPU"]
        if not started and free < wanted:
            logger.warning(
                "waiting for the Ray cluster: %d engines ask for %g CPUs each, %g are free",
                len(starting), wanted, free,
            )  # fmt: skip
        if starting and time.monotonic() > deadline:
            raise EngineStartFailed(f"start_timeout_s: {len(starting)} engines did not start within {timeout_s:g} s")
