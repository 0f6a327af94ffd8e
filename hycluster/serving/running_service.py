"""The service of the Ray cluster that this process has joined, as one says it to somebody who is to decide on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from hycluster.app import APP_NAME
from hycluster.directory.directory import SHARED_DIRECTORY, find_directory
from hycluster.door import IngressAddresses
from hycluster.errors import SettingsError
from hycluster.serving.running import Chosen

ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningService:
    """What is known of it.

    Attributes:
        addresses: of its ingress processes; None while a request would not succeed.
        replicas: by model or adapter, how many replicas take requests.
    """

    where: Chosen
    ingresses: int
    addresses: IngressAddresses | None
    replicas: dict[str, int]

    def __str__(self) -> str:
        serving = ", ".join(f"{name} ({count} replicas)" for name, count in sorted(self.replicas.items())) or "none"
        at = f", {self.addresses.http} grpc {self.addresses.grpc}" if self.addresses else ", not able to serve now"
        return (
            f"the service of Ray cluster {self.where}\n  models: {serving}\n  ingress processes: {self.ingresses}{at}"
        )


def there_is_one() -> bool:
    """Whether hycluster runs in this Ray cluster."""
    return APP_NAME in serve.status().applications


def find_service(where: Chosen) -> RunningService:
    """Look at it; changes nothing.

    Raises:
        SettingsError: there is none.
    """
    app = serve.status().applications.get(APP_NAME)
    if app is None:
        raise SettingsError(
            f"{where.said_by}: no hycluster is running in the Ray cluster {where}; start one with 'hycluster serve'"
        )
    ingress = app.deployments.get("ingress")
    addresses: IngressAddresses | None = None
    # It may be starting, or without an ingress process that answers.
    with contextlib.suppress(Exception):
        addresses = serve.get_app_handle(APP_NAME).addresses.remote().result(timeout_s=ANSWER_TIMEOUT_S)
    replicas: dict[str, int] = {}
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        directory: Any = find_directory(SHARED_DIRECTORY)
        replicas = ray.get(directory.models.remote(), timeout=ANSWER_TIMEOUT_S)
    running = sum(count for state, count in ingress.replica_states.items() if state == "RUNNING") if ingress else 0
    return RunningService(where, running, addresses, replicas)
