"""The Ray Serve application: a deployment for each model, one for the ingress processes, one for batches, and how they
hang together.

``hycluster serve`` runs it; ``serve deploy`` and KubeRay start the same thing by the import path
``hycluster.app:build`` with a settings file's content as arguments (``hycluster/k8s/render.py`` writes them).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from hycluster import logs
from hycluster.batch_api.executor import BatchExecutor
from hycluster.directory.directory import SHARED_DIRECTORY
from hycluster.directory.scaler import autoscaling_config
from hycluster.directory.starts import ENDLESS
from hycluster.door import IngressProcess
from hycluster.replica.placement import actor_options, bundles, strategy, with_room
from hycluster.replica.rank import DrainTimes
from hycluster.replica.replica import Replica
from hycluster.settings.model import Model
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings
from hycluster.spread import ingress_nodes, ingress_resources

APP_NAME = "hycluster"
# Serve notices that a process is gone when it next asks for its health, and then replaces it.
HEALTH_CHECK_PERIOD_S = 1.0
# An upgrade that can't start its replicas is to stop, before it has stopped more of the old ones.
UPGRADE_TRIES = 3


def build(arguments: dict[str, Any]) -> Application:
    """Serve's application builder: settings as a mapping.

    Serve calls it within the cluster, anew for every change of the settings: models that have room for it then get
    their successors before their replicas stop, as by ``hycluster upgrade``.
    """
    settings = validate(Settings, arguments, "settings")
    free = ray.available_resources() if ray.is_initialized() else {}
    return application(settings, surging=with_room(settings.models, free))


def application(
    settings: Settings,
    directory: str = SHARED_DIRECTORY,
    surging: Collection[str] = (),
    counts: Mapping[str, int] | None = None,
) -> Application:
    """Replicas of every model, and ingress processes that open when one of the models can be served.

    Args:
        surging: models whose replicas are replaced by successors that have started; see :func:`replicas`.
        counts: by model, how many replicas a running service has; one that follows its load goes on with as many.
    """
    counts = counts or {}
    others = [
        replicas(model, settings, directory, surge=model.name in surging, found=counts.get(model.name))
        for model in settings.models
    ]
    if settings.batches is not None:
        others.append(_batch_executor(settings, directory))
    ingress = serve.deployment(
        name="ingress",
        num_replicas=settings.ingress.replicas,
        max_surge_percent=_one_more(settings.ingress.replicas),
        max_constructor_retry_count=UPGRADE_TRIES * settings.ingress.replicas if counts else ENDLESS,
        # Nothing, so that a laptop's cores stay free for the engine, and there is always room for an ingress process's
        # successor.
        ray_actor_options={
            "num_cpus": 0,
            "resources": ingress_resources(settings, ingress_nodes(settings)),
            "runtime_env": {"env_vars": _environment(settings)},
        },
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 15,
        graceful_shutdown_wait_loop_s=0.1,
        max_ongoing_requests=1000,
    )(IngressProcess)
    return ingress.bind(settings, directory, *others)


# The work of ingress processes and of the batch executor is Python on one thread; OpenMP's would only stand in the
# engine's way.
_INGRESS_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# What OpenTelemetry's variables hold in secret stays with the processes that have it of themselves.
_SECRET = ("HEADERS", "KEY", "CERTIFICATE")


def _environment(settings: Settings) -> dict[str, str]:
    said = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("OTEL_") and not any(secret in name for secret in _SECRET)
    }
    return said | logs.environment(settings.logs) | _INGRESS_ENVIRONMENT


def _batch_executor(settings: Settings, directory: str) -> Application:
    """One process for the whole service; a second one would only wait for the first one's leases."""
    assert settings.batches is not None
    executor = serve.deployment(
        name="batches",
        num_replicas=1,
        # Nothing that engines may need; a machine may have no more than they ask for.
        ray_actor_options={
            "num_cpus": 0,
            "resources": settings.batches.resources,
            "runtime_env": {"env_vars": _environment(settings)},
        },
        max_constructor_retry_count=ENDLESS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=15,
        graceful_shutdown_wait_loop_s=0.1,
    )(BatchExecutor)
    return executor.bind(settings, directory)


def deployment_name(model: Model) -> str:
    """Serve's name of a model's deployment: letters, digits and dashes."""
    return deployment_of(model.name)


def deployment_of(model_name: str) -> str:
    """The same by the model's name."""
    return "replica-" + re.sub(r"[^a-z0-9]+", "-", model_name.lower()).strip("-")


def _one_more(count: int) -> int:
    """Per cent of ``count`` by which Serve lets a rolling replacement exceed it: one of them."""
    return math.ceil(100 / max(1, count))


def replicas(
    model: Model, settings: Settings, directory: str, *, surge: bool = False, found: int | None = None
) -> Application:
    """One model's pool as a deployment.

    Args:
        found: how many replicas it has in a running service; None if it is not there.
        surge: a replacement starts each replica's successor before it stops the replica; needs room for one more.
    """
    placement: dict[str, Any] = {}
    if reservations := bundles(model):
        placement = {"placement_group_bundles": reservations, "placement_group_strategy": strategy(model)}
    size: dict[str, Any] = {"num_replicas": model.replicas.count}
    count = model.replicas.count
    if model.replicas.vary:
        size = {"autoscaling_config": autoscaling_config(model, directory, keep_count=found is not None)}
        count = count if found is None else found
    options = actor_options(model)
    options["runtime_env"]["env_vars"] |= logs.environment(settings.logs)
    deployment = serve.deployment(
        name=deployment_name(model),
        **size,
        max_surge_percent=_one_more(count) if surge else 0,
        max_constructor_retry_count=ENDLESS if found is None else UPGRADE_TRIES * max(1, count),
        ray_actor_options=options,
        **placement,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 15,
        graceful_shutdown_wait_loop_s=0.1,
    )(Replica)
    patience = DrainTimes(settings.drain_timeout_s, settings.hand_over_after_s)
    return deployment.bind(model, settings.data_plane, directory, patience)
