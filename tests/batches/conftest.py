from __future__ import annotations

from pathlib import Path

import pytest

from hycluster.batches.store import Store
from hycluster.config import Batches


@pytest.fixture
def settings(tmp_path: Path) -> Batches:
    return Batches(store=str(tmp_path / "store"), poll_s=0.02, shard_lines=4, lines_in_flight=8)


@pytest.fixture
def store(settings: Batches) -> Store:
    return Store(settings)
