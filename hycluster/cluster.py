"""The Ray cluster around it all: join it or start one, deploy, wait until a request would succeed, stop.

Also the pool of a batch job's own (``dedicated``): the same replicas as plain actors, without doors.

Pinned to Ray 2.60.0: ``enable_token_auth_by_default`` is Ray's own and private.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hycluster.app import APP_NAME, application
from hycluster.config import Model, Settings, home
from hycluster.directory import NAMESPACE, SHARED_DIRECTORY, open_directory
from hycluster.door import DoorAddresses
from hycluster.engine.scratch import sweep
from hycluster.errors import START_FAILURE, EngineStartFailed, HyclusterError, SettingsError
from hycluster.memory import MONITOR_VARIABLE, MemoryGuard
from hycluster.placement import actor_options, bundles, on_gpus, reserved, strategy
from hycluster.rank import Patience
from hycluster.replica import Replica
from hycluster.spread import door_nodes, doors_per_node

logger = logging.getLogger(__name__)

GIB = 1 << 30
# How an engine's or a door's one-line reason is told from the rest of Ray's report.
_REASON = re.compile(rf"RuntimeError: {START_FAILURE}(\w+): (.+)")


def connect(address: str | None = None) -> None:
    """Join the Ray cluster at ``address``, in ``RAY_ADDRESS``, or the one that ``hycluster serve`` started here.

    Raises:
        SettingsError: there is none, or it does not answer.
    """
    if ray.is_initialized():
        return
    started_here = _remembered()
    address = address or os.environ.get("RAY_ADDRESS") or started_here or "auto"
    where = "on this machine" if address == "auto" else f"at {address!r}"
    if address == started_here:
        # As ``ray.init`` does by itself for a cluster that it starts, but not for one that is named.
        enable_token_auth_by_default()
    _quiet()
    # Ray's C++ prints an error line for each of Ray Data's actors that is none.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        _check_reachable(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(f"RAY_ADDRESS: no Ray cluster {where}: {_one_line(error)}") from None


def _check_reachable(address: str) -> None:
    """Ray itself tries an address at which nobody listens for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _quiet() -> None:
    """Ray's own notices are for Ray's developers; its log files keep them all."""
    for name in ("ray", "ray.serve", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start() -> bool:
    """Join the cluster in ``RAY_ADDRESS``, or start one on this machine.

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
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    for process in psutil.Process().children():
        if process.name() == "raylet":
            MemoryGuard(process, tell=logger.warning).start()
    _clusters().mkdir(parents=True, exist_ok=True)
    state = {"address": ray.get_runtime_context().gcs_address, "pid": os.getpid()}
    written = _clusters() / f"{os.getpid()}.tmp"
    written.write_text(json.dumps(state))
    written.replace(written.with_suffix(".json"))
    return True


def _clusters() -> Path:
    """A file for each cluster that was started on this machine."""
    return home() / "state" / "clusters"


def _remembered() -> str | None:
    """Address of the last cluster that :func:`start` started on this machine and whose process lives."""
    found: list[tuple[float, str]] = []
    for file in _clusters().glob("*.json"):
        try:
            state = json.loads(file.read_text())
            os.kill(state["pid"], 0)
            found.append((file.stat().st_mtime, str(state["address"])))
        except (OSError, ValueError, KeyError):
            # Its process is gone.
            file.unlink(missing_ok=True)
    return max(found)[1] if found else None


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


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running application, and the Ray cluster that it runs on."""

    doors: DoorAddresses
    ray: str


def deploy(settings: Settings, *, started_ray: bool, stopping: threading.Event) -> Deployed | None:
    """Start the application and wait until a request would succeed, or until ``stopping`` is set: then None.

    Args:
        started_ray: whether this process started the Ray cluster; one that it joined is left as it was found.

    Raises:
        SettingsError, EngineStartFailed: an engine or a door could not start; one line says why.
    """
    check_resources(settings.models)
    check_doors(settings)
    # Serve's proxies share their ports with whoever asks for it, and would take callers from the doors.
    serve.start(proxy_location="Disabled")
    if APP_NAME in serve.status().applications:
        raise SettingsError(
            "RAY_ADDRESS: a hycluster is running in this Ray cluster already; stop it first,"
            " or give it these settings by 'hycluster upgrade'"
        )
    serve.run_many(
        [serve.RunTarget(application(settings), name=APP_NAME, route_prefix=None)],
        wait_for_applications_running=False,
    )
    try:
        addresses = wait_until_open(settings.start_timeout_s, stopping)
    except (HyclusterError, ray.exceptions.RayError) as error:
        if not started_ray:
            stop(drain_timeout_s=0)
        raise (error if isinstance(error, HyclusterError) else _failure(str(error))) from None
    return Deployed(addresses, ray.get_runtime_context().gcs_address) if addresses else None


def wait_until_open(timeout_s: float, stopping: threading.Event) -> DoorAddresses | None:
    """Wait until the doors are open; None if ``stopping`` is set before."""
    deadline = time.monotonic() + timeout_s
    door: DeploymentHandle[Any] | None = None
    while not stopping.wait(0.2):
        app = serve.status().applications.get(APP_NAME)
        messages = [app.message, *(d.message for d in app.deployments.values())] if app else []
        # The first reason that an engine or a door gives is enough: trying again would not change it.
        if any(_REASON.search(text) for text in messages):
            raise _failure(" ".join(messages))
        state = _one_line(" ".join(messages))
        if app and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise EngineStartFailed(f"the application did not start: {state}")
        if app and app.status == ApplicationStatus.RUNNING:
            door = door or serve.get_app_handle(APP_NAME)
            if addresses := door.addresses.remote().result(timeout_s=timeout_s):
                return cast(DoorAddresses, addresses)
        if time.monotonic() > deadline:
            raise EngineStartFailed(f"start_timeout_s: the application did not run after {timeout_s:g} s: {state}")
    return None


def _failure(report: str) -> HyclusterError:
    """The error that an engine or a door ended with, out of what Ray says about it."""
    found = _REASON.search(report)
    if found is None:
        return EngineStartFailed(_one_line(report))
    kind = SettingsError if found[1] == SettingsError.__name__ else EngineStartFailed
    return kind(found[2].strip())


def stop(drain_timeout_s: float) -> None:
    """Drain the doors and the replicas and remove the application, if there is one."""
    try:
        serve.delete(APP_NAME, _blocking=False)
    except RayServeException:
        return
    deadline = time.monotonic() + drain_timeout_s + 30
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)
    serve.shutdown()
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(SHARED_DIRECTORY, namespace=NAMESPACE))
    sweep()


@contextlib.contextmanager
def dedicated_pool(settings: Settings, model_name: str) -> Iterator[str]:
    """Engines of a batch job's own; yields the name of their directory, stops them at the end.

    Joins the running Ray cluster, or starts one for the job.

    Raises:
        SettingsError: no such model, or the cluster is too small.
        EngineStartFailed: an engine could not start.
    """
    model = settings.model(model_name)
    if not ray.is_initialized():
        try:
            connect()
        except SettingsError:
            if os.environ.get("RAY_ADDRESS"):
                raise
            start()
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


def _one_line(error: BaseException | str, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
