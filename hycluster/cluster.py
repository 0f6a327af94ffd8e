"""The Ray cluster around it all: join it or start one, deploy, wait until a request would succeed, stop.

Also the pool of a batch job's own (``dedicated``): the same replicas as plain actors, without doors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from hycluster.app import APP_NAME, actor_options, application
from hycluster.config import Model, Settings, home
from hycluster.directory import NAMESPACE, SHARED_DIRECTORY, open_directory
from hycluster.door import DoorAddresses
from hycluster.errors import EngineStartFailed, SettingsError, Unavailable
from hycluster.ingress.ports import check_port
from hycluster.replica import Replica

logger = logging.getLogger(__name__)

GIB = 1 << 30
# How an engine's or a door's one-line reason is told from the rest of Ray's report (see replica.py).
_REASON = re.compile(r"RuntimeError: hycluster: (.+)")


def connect(address: str | None = None) -> None:
    """Join the Ray cluster at ``address``, in ``RAY_ADDRESS``, or the one that ``hycluster serve`` started here.

    Raises:
        Unavailable: there is none, or it does not answer.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or _remembered() or "auto"
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = "on this machine" if address == "auto" else f"at {address!r}"
        raise Unavailable(f"RAY_ADDRESS: no Ray cluster {where}: {_one_line(error)}") from None


def start() -> bool:
    """Join the cluster in ``RAY_ADDRESS``, or start one on this machine.

    Returns:
        Whether one was started; it ends with this process.
    """
    if os.environ.get("RAY_ADDRESS"):
        connect()
        return False
    # Ray gives its workers a nice value of 15; engines and doors are what this machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )
    _state_file().parent.mkdir(parents=True, exist_ok=True)
    _state_file().write_text(json.dumps({"address": ray.get_runtime_context().gcs_address, "pid": os.getpid()}))
    return True


def _state_file() -> Path:
    return home() / "state" / "cluster.json"


def _remembered() -> str | None:
    """Address of the cluster that the last :func:`start` on this machine started, while its process lives."""
    try:
        state = json.loads(_state_file().read_text())
        os.kill(state["pid"], 0)
        return str(state["address"])
    except (OSError, ValueError, KeyError):
        return None


def check_resources(models: tuple[Model, ...]) -> None:
    """Refuse settings that this cluster can't hold, before anything starts.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    there = ray.cluster_resources()
    wanted = {
        "CPU": sum(m.hardware.cpus * m.replicas.count for m in models),
        "GPU": sum(m.parallel.devices * m.replicas.count for m in models if m.hardware.accelerator),
        "memory": sum((m.hardware.memory_gib or 0) * GIB * m.replicas.count for m in models),
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
        if accelerator and f"accelerator_type:{accelerator}" not in there:
            kinds = sorted(name.split(":", 1)[1] for name in there if name.startswith("accelerator_type:"))
            raise SettingsError(
                f"models: {model.name}: hardware.accelerator: {accelerator!r} is not in this Ray cluster;"
                f" there are {kinds or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running application, and the Ray cluster that it runs on."""

    doors: DoorAddresses
    ray: str


def deploy(settings: Settings, *, started_ray: bool) -> Deployed:
    """Start the application and wait until a request would succeed.

    Args:
        started_ray: whether this process started the Ray cluster; then the doors will be on this machine.

    Raises:
        SettingsError, EngineStartFailed: an engine or a door could not start; one line says why.
    """
    check_resources(settings.models)
    if started_ray:
        check_port(settings.http.host, settings.http.port, "http.port")
        check_port(settings.grpc.host, settings.grpc.port, "grpc.port")
    ray.get(open_directory().set_settings.remote(settings))
    serve.start(proxy_location="Disabled" if started_ray else "EveryNode")
    serve.run_many(
        [serve.RunTarget(application(settings), name=APP_NAME, route_prefix=None)],
        wait_for_applications_running=False,
    )
    _wait_until_running(settings.start_timeout_s)
    door = serve.get_app_handle(APP_NAME)
    addresses: DoorAddresses = door.addresses.remote().result(timeout_s=settings.start_timeout_s)
    while not door.able.remote().result(timeout_s=settings.start_timeout_s):
        time.sleep(0.1)
    return Deployed(addresses, ray.get_runtime_context().gcs_address)


def _wait_until_running(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        app = serve.status().applications.get(APP_NAME)
        messages = [app.message, *(d.message for d in app.deployments.values())] if app else []
        # The first reason that an engine or a door gives is enough: trying again would not change it.
        if reason := next((m for text in messages for m in _REASON.findall(text)), None):
            raise EngineStartFailed(reason.strip())
        if app and app.status == ApplicationStatus.RUNNING:
            return
        if app and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise EngineStartFailed(f"the application did not start: {_one_line(' '.join(messages))}")
        if time.monotonic() > deadline:
            raise EngineStartFailed(
                f"start_timeout_s: the application was not running after {timeout_s:g} s: {_one_line(' '.join(messages))}"
            )
        time.sleep(0.2)


def stop() -> None:
    """Drain the doors and the replicas and remove the application."""
    serve.delete(APP_NAME)
    serve.shutdown()
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(SHARED_DIRECTORY, namespace=NAMESPACE))


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
        except Unavailable:
            if os.environ.get("RAY_ADDRESS"):
                raise
            start()
    check_resources((model,))
    name = f"{SHARED_DIRECTORY}-{secrets.token_hex(6)}"
    directory = open_directory(name)
    replica = ray.remote(Replica).options(**actor_options(model))
    actors: list[Any] = [
        replica.remote(model, settings.data_plane, name, settings.drain_timeout_s)
        for _ in range(model.replicas.count)
    ]
    try:
        try:
            ray.get([actor.ready.remote() for actor in actors], timeout=settings.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise EngineStartFailed(
                f"start_timeout_s: no engine after {settings.start_timeout_s:g} s; is the cluster busy?"
            ) from None
        except ray.exceptions.RayError as error:
            reason = _REASON.search(str(error))
            raise EngineStartFailed(reason[1].strip() if reason else _one_line(error)) from None
        yield name
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.kill(directory)


def _one_line(error: BaseException | str, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
