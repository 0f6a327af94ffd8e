"""New settings for a service that runs: Serve replaces its replicas and its ingress processes one by one, and no
request fails.

It is Serve's own rolling update. What makes it one without a gap lies elsewhere: a replica that is stopped hands over
what it has (``hycluster/replica/rank.py``), an ingress process's successor listens before the ingress process stops
(``hycluster/door.py``).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from hycluster.app import APP_NAME, application, deployment_name
from hycluster.door import IngressAddresses
from hycluster.errors import EngineStartFailed, HyclusterError, SettingsError, one_line, reported
from hycluster.serving.resources import check_batches, check_ingress, check_resources
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings


def roll_out(settings: Settings, surging: frozenset[str], stopping: threading.Event) -> Deployed | None:
    """Roll these settings out over the running service; returns when all that is new serves.

    What is old may drain for a while longer. ``http.port`` and ``grpc.port`` 0 are the ports that are open now.

    Args:
        surging: models with room for a successor beside the old replica; see
            :func:`hycluster.replica.placement.with_room`.
        stopping: gives up waiting, not the upgrade: then None.

    Raises:
        SettingsError: nothing runs here, or the settings do not fit the cluster; nothing has changed.
        EngineStartFailed: a new replica or ingress process did not start. Serve stops there; the old ones go on.
    """
    ingresses = running()
    settings = _same_ports(settings, ingresses)
    check_resources(settings.models)
    check_ingress(settings)
    check_batches(settings)
    app = application(settings, surging=surging, counts=_running_replicas(settings.models))
    serve.run_many(
        [serve.RunTarget(app, name=APP_NAME, route_prefix=None)],
        wait_for_applications_running=False,
    )
    try:
        addresses = wait_until_open(settings.start_timeout_s * _batches(settings), stopping)
    except HyclusterError as error:
        raise type(error)(f"{error.message} (what has not been replaced serves on with the old settings)") from None
    return Deployed(addresses, ray.get_runtime_context().gcs_address) if addresses else None


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running application, and the Ray cluster that it runs on."""

    ingresses: IngressAddresses
    ray: str


def wait_until_open(timeout_s: float, stopping: threading.Event) -> IngressAddresses | None:
    """Wait until all that is new runs; None if ``stopping`` is set before.

    Raises:
        SettingsError, EngineStartFailed: something that is new did not start.
    """
    deadline = time.monotonic() + timeout_s
    ingress: DeploymentHandle[Any] | None = None
    while not stopping.wait(0.5):
        app = serve.status().applications.get(APP_NAME)
        messages = [app.message, *(d.message for d in app.deployments.values())] if app else []
        # The first reason that an engine or an ingress process gives is enough: what is old serves on, and somebody
        # waits to hear.
        if error := reported(" ".join(messages)):
            raise error
        state = one_line(" ".join(messages))
        if app and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise EngineStartFailed(f"the application did not start: {state}")
        if app and app.status == ApplicationStatus.RUNNING:
            ingress = ingress or serve.get_app_handle(APP_NAME)
            if addresses := ingress.addresses.remote().result(timeout_s=timeout_s):
                return cast(IngressAddresses, addresses)
        if time.monotonic() > deadline:
            raise EngineStartFailed(f"start_timeout_s: the application did not run after {timeout_s:g} s: {state}")
    return None


def running() -> IngressAddresses:
    """Where the service of this Ray cluster is to be reached.

    Raises:
        SettingsError: there is none, or it can't serve now.
    """
    if APP_NAME not in serve.status().applications:
        raise SettingsError(
            "RAY_ADDRESS: no hycluster is running in this Ray cluster; start one with 'hycluster serve'"
        )
    addresses = serve.get_app_handle(APP_NAME).addresses.remote().result(timeout_s=30)
    if addresses is None:
        raise SettingsError("RAY_ADDRESS: the hycluster in this Ray cluster can't serve any of its models now")
    found: IngressAddresses = addresses
    return found


def free() -> dict[str, Any]:
    """What nobody has reserved in this Ray cluster, by Ray's names of resources."""
    return dict(ray.available_resources())


def _running_replicas(models: tuple[Model, ...]) -> dict[str, int]:
    """By model, how many replicas the service has; models that it does not have are left out."""
    deployments = serve.status().applications[APP_NAME].deployments
    names = {model.name: deployment_name(model) for model in models}
    return {
        model: sum(count for state, count in deployments[name].replica_states.items() if state == "RUNNING")
        for model, name in names.items()
        if name in deployments
    }


def _same_ports(settings: Settings, ingresses: IngressAddresses) -> Settings:
    http, grpc = (int(address.rpartition(":")[2]) for address in (ingresses.http, ingresses.grpc))
    return settings.model_copy(
        update={
            "http": settings.http.model_copy(update={"port": settings.http.port or http}),
            "grpc": settings.grpc.model_copy(update={"port": settings.grpc.port or grpc}),
        }
    )


def _batches(settings: Settings) -> int:
    """How many replicas of a pool start one after the other, at most."""
    return 1 + max(model.replicas.most for model in settings.models)
