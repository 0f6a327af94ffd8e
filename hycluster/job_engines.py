"""The engines of a batch job: those of the running cluster, or a pool of its own while it runs.

Its own module, so that ``hycluster/batch`` knows neither Ray clusters nor the service; ``hycluster/cli.py`` brings the
two together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hycluster.errors import JobFailed, SettingsError, UnknownModel
from hycluster.imports import without_collector
from hycluster.sudden_end import told_if_sudden
from hycluster.terminal import echo

if TYPE_CHECKING:
    from hycluster.batch.job import Job
    from hycluster.batch.task import Connect, JobBackend
    from hycluster.directory.directory import IngressReport
    from hycluster.serving.running import Chosen
    from hycluster.settings.settings import Settings

GOES_ON = "the same command goes on from here, once there is a cluster"
# Ray does not say which.
SUDDEN = f"error: this job's process was ended: its Ray cluster is gone, or somebody killed it; {GOES_ON}"


@contextmanager
def open_engines(job: Job, settings: Settings | None, address: str | None) -> Iterator[Connect]:
    """What ``job.engine`` asks for, while the block lasts.

    Args:
        settings: the deployment; needed for ``engine: dedicated`` only.
        address: of the Ray cluster to join; see :func:`hycluster.cluster.join_cluster`.

    Raises:
        SettingsError, UnknownModel: there are no such engines.
        EngineStartFailed: one of the job's own could not start.
    """
    import ray

    from hycluster import cluster
    from hycluster.directory.directory import SHARED_DIRECTORY, find_directory

    if job.engine == "shared":
        _say_where(cluster.join_cluster(address))
        try:
            directory: Any = find_directory(SHARED_DIRECTORY)
        except ValueError:
            raise SettingsError("engine: 'shared' needs a running hycluster; start one or take 'dedicated'") from None
        served: Any = ray.get(directory.models.remote())
        if job.model not in served:
            raise UnknownModel(job.model, sorted(served))
        found: Any = ray.get(directory.ingresses.remote())
        with _cluster_watched(own=False):
            yield partial(_open_soon, SHARED_DIRECTORY, job.model, found)
    else:
        from hycluster.dedicated import dedicated_pool
        from hycluster.engine.names import check_names

        if settings is None:
            raise SettingsError("engine: 'dedicated' needs the settings of a deployment (--config)")
        check_names(settings.model(job.model))
        joined = cluster.join_or_start(address)
        _say_where(joined)
        with _cluster_watched(own=joined is None), dedicated_pool(settings, job.model) as name:
            yield partial(_open_generator, name, job.model)


@contextmanager
def _cluster_watched(*, own: bool) -> Iterator[None]:
    """Has this process end with a word if the cluster does: Ray ends a driver without one, or has it wait for ever.

    Args:
        own: this process started the cluster, and what is left of it ends with this process.
    """
    import ray

    from hycluster.serving.cluster_watch import ClusterWatch, watched

    with told_if_sudden(SUDDEN) as dismiss:

        def end(code: int) -> None:
            dismiss()
            os._exit(code)

        address = ray.get_runtime_context().gcs_address
        say = partial(echo, err=True)
        watch = ClusterWatch(watched(address, own=own), say, lambda _: None, end, JobFailed.exit_code, GOES_ON)
        try:
            yield
        finally:
            watch.close()


def _say_where(joined: Chosen | None) -> None:
    where = joined or "of its own, which ends with it"
    echo(f"the job runs on the Ray cluster {where}", err=True)


def _open_soon(directory: str, model: str, ingresses: list[IngressReport]) -> AbstractAsyncContextManager[JobBackend]:
    """Runs where the rows are: there is an ingress that does the first of them, if one is reached from there."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    near = sorted((one for one in ingresses if one.everywhere or one.node == here), key=lambda one: one.node != here)
    own = partial(_open_generator, directory, model)
    if not near:
        return own()
    from hycluster.first_rows import open_first_rows

    return open_first_rows(near[0].grpc, own)


def _open_generator(directory: str, model: str) -> AbstractAsyncContextManager[JobBackend]:
    """Runs where the rows are; the driver has no need of vLLM."""
    with without_collector():
        from hycluster.gateway.generation import open_generator

    return open_generator(directory, model)
