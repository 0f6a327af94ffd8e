"""The service as ``hycluster serve`` looks after it: waits for its start, then tells on standard error what it loses.

It gives nothing up that serves. Whatever dies, Ray Serve replaces; only Ray itself can't be (``cluster_watch.py``).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from hycluster.app import APP_NAME, deployment_name
from hycluster.directory.directory import SHARED_DIRECTORY, Overview
from hycluster.door import IngressAddresses
from hycluster.errors import one_line
from hycluster.serving import ray_state
from hycluster.serving.cluster_watch import ClusterWatch, watched
from hycluster.serving.losses import Losses
from hycluster.serving.start import end_of_hope, ready_models
from hycluster.settings.settings import Settings

logger = logging.getLogger(__name__)

STARTING_LOOK_EVERY_S = 0.5
# A look costs the Serve controller and this process some 3 ms.
LOOK_EVERY_S = 1.0
# Walks all of the machine's processes.
REMEMBER_EVERY_S = 5.0
ADDRESSES_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Opened:
    """What can be served now, and where."""

    ingresses: IngressAddresses
    models: tuple[str, ...]


class Service:
    """One application on a Ray cluster that this process has joined.

    Args:
        own: this process started the Ray cluster.
        say: prints a line for whoever runs the command.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None], *, own: bool) -> None:
        self._settings = settings
        self._say = say
        names = {"ingress": "ingress process", "batches": "batch executor"}
        names |= {deployment_name(model): f"replica of {model.name}" for model in settings.models}
        self._losses = Losses(names, frozenset({ray.util.get_node_ip_address()}))
        self._last = ray_state.Look()
        self._ingresses: dict[str, Any] = {}
        self._remembered_s = float("-inf")
        address = ray.get_runtime_context().gcs_address
        self._watch = ClusterWatch(watched(address, own=own), say, self._drain)

    def close(self) -> None:
        """Look after it no longer; it is to be stopped."""
        self._watch.close()

    def wait_until_open(self, stopping: threading.Event) -> Opened | None:
        """Wait until a request to each model would succeed that can be started; None if ``stopping`` is set before.

        Raises:
            SettingsError, EngineStartFailed: no request has ever succeeded, and none will.
        """
        begun_s, served = time.monotonic(), False
        while not stopping.wait(STARTING_LOOK_EVERY_S):
            self._look()
            overview, elapsed_s = self._last.overview or Overview(), time.monotonic() - begun_s
            addresses = self._addresses()
            served |= addresses is not None
            if addresses and (ready := ready_models(self._settings, overview, elapsed_s=elapsed_s)):
                self._losses.started()
                return Opened(addresses, tuple(ready))
            reports = [deployment.message for deployment in (self._last.deployments or {}).values()]
            if not served and (error := end_of_hope(self._settings, overview, reports, elapsed_s=elapsed_s)):
                raise error
        return None

    def attend(self, stopping: threading.Event) -> None:
        """Tell what is lost and what is back until ``stopping`` is set."""
        puzzled = False
        while not stopping.wait(LOOK_EVERY_S):
            try:
                self._look()
            except Exception as error:
                # Whoever looks after what serves must not take it along; the next look may understand more.
                if not puzzled:
                    why = f"{type(error).__name__}: {one_line(error)}"
                    self._say(f"can't tell what is lost, what runs serves on: {why}")
                    logger.exception("a look at the service")
                puzzled = True
            else:
                puzzled = False

    def _look(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self._last = ray_state.look(APP_NAME, SHARED_DIRECTORY)
            for line in self._losses.compare(self._last):
                self._say(line)
            self._ingresses = self._ingress_actors()
        if time.monotonic() - self._remembered_s >= REMEMBER_EVERY_S:
            self._remembered_s = time.monotonic()
            self._watch.remember()

    def _ingress_actors(self) -> dict[str, Any]:
        """Handles of the ingress processes' actors, by id: to be had only while GCS lives."""
        if self._last.deployments is None:
            return self._ingresses
        found: dict[str, Any] = {}
        for process in self._last.processes.values():
            if process.deployment == "ingress":
                with contextlib.suppress(ValueError):
                    found[process.id] = self._ingresses.get(process.id) or ray_state.handle(process)
        return found

    def _drain(self, limit_s: float) -> None:
        ray_state.drain(list(self._ingresses.values()), min(limit_s, self._settings.drain_timeout_s + 15))

    def _addresses(self) -> IngressAddresses | None:
        """Where an ingress process that can serve listens, if there is one."""
        if not self._ingresses:
            return None
        with contextlib.suppress(RayServeException, ray.exceptions.RayError, TimeoutError):
            found: IngressAddresses | None = (
                serve.get_app_handle(APP_NAME).addresses.remote().result(timeout_s=ADDRESSES_TIMEOUT_S)
            )
            return found
        return None
