"""The pool of a batch job's own (``engine: dedicated``): the replicas of a service as plain actors, without ingress
processes."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hycluster.directory.directory import SHARED_DIRECTORY, open_directory
from hycluster.engine.scratch import sweep
from hycluster.errors import EngineStartFailed, why_not_started
from hycluster.replica.placement import actor_options, bundles, reserved, strategy
from hycluster.replica.rank import DrainTimes
from hycluster.replica.replica import Replica
from hycluster.serving.resources import check_resources
from hycluster.settings.model import Colocation, Model
from hycluster.settings.settings import Settings

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def dedicated_pool(settings: Settings, model_name: str) -> Iterator[str]:
    """Engines of a batch job's own; yields the name of their directory, stops them at the end.

    In the Ray cluster that this process has joined; see :func:`hycluster.cluster.join_or_start`.

    Raises:
        SettingsError: no such model, or the cluster is too small.
        EngineStartFailed: an engine could not start.
    """
    # Nobody is online there, and long steps are cheap ones.
    model = settings.model(model_name).model_copy(update={"colocation": Colocation(enabled=False)})
    check_resources((model,))
    name = f"{SHARED_DIRECTORY}-{secrets.token_hex(6)}"
    directory = open_directory(name)
    groups = [_placement_group(model) for _ in range(max(1, model.replicas.count))]
    actors: list[Any] = [
        ray.remote(Replica)
        .options(**actor_options(model), **_in_first_bundle(group))
        .remote(model, settings.data_plane, name, DrainTimes(settings.drain_timeout_s, settings.hand_over_after_s))
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
            raise why_not_started(str(error)) from None
        free, wanted = ray.available_resources().get("CPU", 0.0), reserved(model)["CPU"]
        if not started and free < wanted:
            logger.warning(
                "waiting for the Ray cluster: %d engines ask for %g CPUs each, %g are free",
                len(starting), wanted, free,
            )  # fmt: skip
        if starting and time.monotonic() > deadline:
            raise EngineStartFailed(f"start_timeout_s: {len(starting)} engines did not start within {timeout_s:g} s")
