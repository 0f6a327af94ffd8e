"""What the driver holds of a corpus before a row is read; the rest of the pipeline is in test_run.py."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc

from hycluster.batch.input.corpus import File, Shard, ShardPlan
from hycluster.batch.output.shard_set import ShardSet
from hycluster.batch.stream import CorpusDatasource
from tests.located import at

ROWS = 10_000_000


def plan_of(rows: int) -> ShardPlan:
    """Ten files in row groups of 50,000 rows of 100 bytes."""
    groups = (50_000,) * (rows // 10 // 50_000)
    files = tuple(File(f"{n}.parquet", rows * 10, groups, rows * 10, "s") for n in range(10))
    return ShardPlan(at("/"), ("**", "*.parquet"), files, 256)


def tasks_of(source: CorpusDatasource) -> list[list[Shard]]:
    return [list(task.read_fn.args[1]) for task in source.get_read_tasks(1)]  # type: ignore[attr-defined]


def test_ten_million_rows_are_a_few_kib_a_read() -> None:
    whole = plan_of(ROWS)
    tracemalloc.start()
    done = ShardSet(range(0, whole.shard_count, 1000))
    source = CorpusDatasource(whole, (shard for shard in whole.shards() if shard.number not in done))
    tasks = source.get_read_tasks(len(source))
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole.shard_count == 39_070
    assert 600 < len(tasks) < 640
    assert held_bytes < 1_500_000
    assert max(len(pickle.dumps(task.read_fn.args)) for task in tasks) < 2_000  # type: ignore[attr-defined]
    # A shard is a row for Ray.
    assert sum(task.metadata.num_rows or 0 for task in tasks) == whole.shard_count - len(done)


def test_reads_hold_every_shard_that_is_not_done_once_and_in_order() -> None:
    whole = plan_of(5_000_000)
    done = ShardSet([0, 1, 63, 64, 65, *range(2000, 2500), whole.shard_count - 1])
    source = CorpusDatasource(whole, (shard for shard in whole.shards() if shard.number not in done))
    read = list(itertools.chain.from_iterable(tasks_of(source)))
    assert read == [shard for shard in whole.shards() if shard.number not in done]
    assert source.estimate_inmemory_data_size() == sum(shard.bytes for shard in read)
