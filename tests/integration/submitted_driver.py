"""``hycluster`` as a submitted job runs it, with a stand-in for the engines; all else is the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ray import cloudpickle

from hycluster import cli, cluster
from hycluster.batch.cli import Outside
from hycluster.batch.job import Job
from hycluster.batch.task import Connect
from hycluster.settings.settings import Settings
from hycluster.submit.cli import show_submitted
from tests.batch import stand_in


@contextmanager
def engines(job: Job, settings: Settings | None, address: str | None) -> Iterator[Connect]:
    cluster.join_cluster(address)
    yield stand_in.stand_in()


if __name__ == "__main__":
    # Ray's worker processes do not have the tests on their path.
    cloudpickle.register_pickle_by_value(stand_in)
    with patch.object(cli.batch_app.info, "context_settings", {"obj": Outside(engines, show_submitted)}):
        cli.main()
