"""The job as a Ray Data pipeline: read spans of shards, generate, stream the shard records back.

Ray moves input blocks from readers to the generate processes and holds back readers that are
ahead; that is all that is in its object store. A row of a block is a whole shard.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from hycluster.batch.generate import BLOCKS_AT_ONCE, Generate
from hycluster.batch.input.corpus import SPAN_BYTES, Shard, ShardPlan, Span, read_shards, spans
from hycluster.batch.input.tables import pack
from hycluster.batch.job import Job
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.record import ShardRecord
from hycluster.batch.progress.terminal import RunProgress
from hycluster.batch.task import Connect, open_task
from hycluster.storage import Folder

READERS = 4


class CorpusDatasource(Datasource):
    """Reads the given shards of a plan, a span of them a block."""

    def __init__(self, plan: ShardPlan, shards: Iterable[Shard], span_bytes: int = SPAN_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        self._spans = list(spans(shards, span_bytes))

    def __len__(self) -> int:
        """Number of read tasks."""
        return len(self._spans)

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(span.bytes for span in self._spans)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [ReadTask(partial(_read, self._plan.folder, s), _metadata(s)) for s in self._spans]


def stream_records(
    plan: ShardPlan, shards: Iterable[Shard], job: Job, output: OutputFolder, connect: Connect, progress: Any
) -> Generator[ShardRecord]:
    """Run shards through generate and commit; yields each one's record soon after its commit.

    Args:
        progress: handle of a ``JobProgress`` actor.
    """
    # Ray Data prints the stack, twice, of every error that it also raises; the caller tells it in one line.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # By what is in them, whatever the plan took it for: values that a dictionary holds once weigh nothing in a file.
    context.target_max_block_size = SPAN_BYTES
    with DataContext.current(context):
        yield from _records(plan, shards, job, output, connect, progress)


def _records(
    plan: ShardPlan, shards: Iterable[Shard], job: Job, output: OutputFolder, connect: Connect, progress: Any
) -> Iterator[ShardRecord]:
    # Several blocks for each process, even of a small corpus.
    corpus_bytes = sum(file.data_bytes for file in plan.files)
    source = CorpusDatasource(plan, shards, min(SPAN_BYTES, corpus_bytes // (job.generate_processes * 4)))
    # No CPUs: engines may have taken every one of the cluster, or come to need what is free now, and neither must wait
    # for the other.
    blocks = ray.data.read_datasource(
        source, override_num_blocks=len(source), num_cpus=0, concurrency=min(READERS, len(source))
    )
    records = blocks.map_batches(
        Generate,
        fn_constructor_args=(output, partial(open_task, job, connect), partial(_report, progress)),
        fn_constructor_kwargs={"name": job.name, "keep": True},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ActorPoolStrategy(
            size=job.generate_processes,
            max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
            max_tasks_in_flight_per_actor=BLOCKS_AT_ONCE + 1,
        ),
    )
    for batch in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for text in batch.column("record").to_pylist():
            yield ShardRecord.from_dict(json.loads(text))


def _read(folder: Folder, span: Span) -> Iterator[pa.Table]:
    """A row a shard: Ray need not know the types that are in it, and may cut between any two."""
    return map(pack, read_shards(folder, span))


def _metadata(span: Span) -> BlockMetadata:
    return BlockMetadata(num_rows=len(span), size_bytes=span.bytes, input_files=None, exec_stats=None)


def _report(progress: Any, process: str, said: RunProgress) -> None:
    progress.report.remote(process, said)
