"""``hycluster`` as a submitted job runs it, with a stand-in for the engines; all else is the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ray import cloudpickle

from hycluster import cli, cluster
from hycluster.batch import run
from hycluster.batch.job import Job
from hycluster.batch.task import Connect
from hycluster.settings.settings import Settings
from tests.batch import stand_in


@contextmanager
def engines(job: Job, settings: Settings | None, address: str | None = None) -> Iterator[Connect]:
    cluster.connect(address)
    yield stand_in.stand_in()


if __name__ == "__main__":
    # Ray's worker processes do not have the tests on their path.
    cloudpickle.register_pickle_by_value(stand_in)
    with patch.object(run, "_engines", engines):
        cli.main()
