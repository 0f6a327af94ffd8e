from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hycluster.batch_api.store import Store
from hycluster.settings.ingress import Batches
from tests.object_store import ObjectStore, object_store


@pytest.fixture
def settings(tmp_path: Path) -> Batches:
    return Batches(store=str(tmp_path / "store"), poll_s=0.02, shard_lines=4, lines_in_flight=8)


@pytest.fixture
def store(settings: Batches) -> Store:
    return Store(settings)


@pytest.fixture(scope="package")
def objects() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running
