"""The service of a Ray cluster that this process has joined: deploy it, wait until a request would succeed, stop it."""

from __future__ import annotations

import contextlib
import threading
import time

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from hycluster.app import APP_NAME, application
from hycluster.directory.directory import NAMESPACE, SHARED_DIRECTORY
from hycluster.directory.starts import CONTROLLER_OPTIONS
from hycluster.engine.scratch import sweep
from hycluster.errors import HyclusterError, SettingsError, why_not_started
from hycluster.serving import running_service
from hycluster.serving.resources import check_batches, check_ingress, check_resources
from hycluster.serving.running import Chosen
from hycluster.serving.service import Opened, Service
from hycluster.settings.settings import Settings


def deploy(settings: Settings, service: Service, *, started_ray: bool, stopping: threading.Event) -> Opened | None:
    """Start the application and wait until a request would succeed, or until ``stopping`` is set: then None.

    Args:
        service: looks after it.
        started_ray: whether this process started the Ray cluster; one that it joined is left as it was found.

    Raises:
        SettingsError, EngineStartFailed: nothing can be served; one line says why.
    """
    check_resources(settings.models)
    check_ingress(settings)
    check_batches(settings)
    if running_service.there_is_one():
        found = running_service.find_service(Chosen(ray.get_runtime_context().gcs_address, "RAY_ADDRESS", None))
        raise SettingsError(
            "RAY_ADDRESS: a hycluster is running in this Ray cluster already; stop it first,"
            f" or give it these settings by 'hycluster upgrade':\n{found}"
        )
    # Serve's proxies share their ports with whoever asks for it, and would take callers from the ingress.
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
        raise (error if isinstance(error, HyclusterError) else why_not_started(str(error))) from None


def stop(drain_timeout_s: float) -> None:
    """Drain the ingress processes and the replicas and remove the application, if there is one."""
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
