"""The engines of a batch job: those of the running cluster, or a pool of its own while it runs.

Its own module, so that ``hycluster/batch`` knows neither Ray clusters nor the service; ``hycluster/cli.py`` brings the
two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hycluster.errors import SettingsError, UnknownModel
from hycluster.imports import without_collector
from hycluster.terminal import echo

if TYPE_CHECKING:
    from hycluster.batch.job import Job
    from hycluster.batch.task import Connect, JobBackend
    from hycluster.serving.running import Chosen
    from hycluster.settings.settings import Settings


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
        yield partial(_open_generator, SHARED_DIRECTORY, job.model)
    else:
        from hycluster.dedicated import dedicated_pool
        from hycluster.engine.names import check_names

        if settings is None:
            raise SettingsError("engine: 'dedicated' needs the settings of a deployment (--config)")
        check_names(settings.model(job.model))
        _say_where(cluster.join_or_start(address))
        with dedicated_pool(settings, job.model) as name:
            yield partial(_open_generator, name, job.model)


def _say_where(joined: Chosen | None) -> None:
    where = joined or "of its own, which ends with it"
    echo(f"the job runs on the Ray cluster {where}", err=True)


def _open_generator(directory: str, model: str) -> AbstractAsyncContextManager[JobBackend]:
    """Runs where the rows are; the driver has no need of vLLM."""
    with without_collector():
        from hycluster.gateway.generation import open_generator

    return open_generator(directory, model)
