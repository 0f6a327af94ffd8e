"""An engine dies at every write boundary of a job: simulated ones, behind the real gateway and real sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hycluster.batch import run
from hycluster.batch.generate import Generate
from hycluster.batch.input.corpus import ShardPlan, read_shards, spans
from hycluster.batch.input.tables import pack
from hycluster.batch.job import Job
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.verify import verify_output
from hycluster.batch.task import open_task
from hycluster.gateway import flight
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.settings.simulated import Simulated
from hycluster.storage import WritableFolder
from hycluster.storage.disk import DiskFolder
from tests.batch.test_chaos import contents, make_job, texts
from tests.located import at
from tests.simulated_pool import SimulatedPool, SimulatedReplica

__all__ = ["texts"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_imported")]

SETTINGS = Simulated(decode_token_s=0.002, max_model_len=512, vocab_size=256, max_num_seqs=32)
REPLICAS = 2
# Those of these shards and of the whole job.
DEADLY = ("part-00000003", "part-00000012", "00000003-", "00000012-", "00000025-", "_manifest.json", "_SUCCESS")
# What is written as a stream; on a disk all other writes end in one too, and are met before.
STREAMS = ("_manifest.json",)


class Engines:
    """A pool in which one replica dies, and has a successor, before and after each deadly write."""

    def __init__(self, pool: SimulatedPool, model: Model) -> None:
        self._pool = pool
        self._model = model
        self._one_at_a_time = threading.Lock()
        self._dead: list[SimulatedReplica] = []
        self.killed_at: list[str] = []
        self.busy_deaths = 0

    def kill(self, where: str) -> None:
        with self._one_at_a_time:
            place = len(self.killed_at) % REPLICAS
            victim = self._pool[place]
            self.busy_deaths += victim.requests > 0
            victim.die()
            self._dead.append(victim)
            self.killed_at.append(where)
            self._pool.replicas[place] = SimulatedReplica(SETTINGS, f"successor-{len(self.killed_at)}")

    def around(self, real: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
        def call(folder: WritableFolder, path: str, *rest: Any) -> Any:
            deadly = any(path.rpartition("/")[2].startswith(name) for name in names)
            if deadly:
                self.kill(f"before {path.rpartition('/')[2]}")
            result = real(folder, path, *rest)
            if deadly:
                self.kill(f"after {path.rpartition('/')[2]}")
            return result

        return call

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        from hycluster.gateway.generation import Generator
        from hycluster.gateway.opening import open_gateway

        directory = self._pool.directory(self._model)
        unbounded = Admission(max_requests=None)
        async with open_gateway(self._model, directory, router=Router(), admission=unbounded, wait_s=30) as gateway:
            yield Generator({self._model.name: gateway})

    def close(self) -> None:
        for replica in self._dead:
            replica.close()


def generate_here(job: Job, corpus: ShardPlan, output: OutputFolder, connect: Any, *_: Any) -> float:
    """The job's middle without Ray."""
    actor = Generate(output, partial(open_task, job, connect), lambda *_: None, name=job.name)

    async def work() -> None:
        async with connect.opened() as generator:
            connect.generator = generator
            async with asyncio.TaskGroup() as group:
                for span in spans(corpus.shards(), 60_000):
                    group.create_task(actor(pa.concat_tables(map(pack, read_shards(corpus.folder, span)))))

    begun_s = time.monotonic()
    asyncio.run(work())
    return time.monotonic() - begun_s


class Connection:
    """Opens the gateway once, in the loop that also closes it."""

    def __init__(self, engines: Engines) -> None:
        self.opened = engines.open
        self.generator: Any = None

    def __call__(self) -> Any:
        return nullcontext(self.generator)


@pytest.fixture
def engines(tiny_model: Path) -> Iterator[Engines]:
    model = Model(
        name="tiny",
        source=str(tiny_model),
        simulated=SETTINGS,
        engine={"max_model_len": SETTINGS.max_model_len},
        replicas=Replicas(min=REPLICAS),
    )
    with SimulatedPool(SETTINGS, REPLICAS) as pool:
        engines = Engines(pool, model)
        yield engines
        engines.close()


def test_engines_killed_at_write_boundaries(
    engines: Engines, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_generate", generate_here)
    # Engines die here within milliseconds of each other: a row that three of them had is not what they died of.
    monkeypatch.setattr(flight, "MOST_LOSSES", flight.MOST_MOVES)
    sampling = {"max_tokens": 4, "temperature": 0}

    def run_to(name: str) -> Any:
        job = make_job(texts, str(tmp_path / name), model="tiny", retry_s=60, sampling=sampling)
        run.run_job(job, engines=lambda _: nullcontext(Connection(engines)))
        assert verify_output(at(job.output.path), at(texts)).faults == []
        return contents(job.output.path)

    undisturbed = run_to("undisturbed")
    assert len({row["output"] for row in undisturbed[0]}) > 1000
    for name, names in (("write", DEADLY), ("create", DEADLY), ("writing", STREAMS)):
        monkeypatch.setattr(DiskFolder, name, engines.around(getattr(DiskFolder, name), names))
    disturbed = run_to("disturbed")
    assert [row for row in disturbed[1] if row not in undisturbed[1]] == []
    assert disturbed == undisturbed
    # Two shards' part and quarantine, three records, the manifest and _SUCCESS.
    assert len(engines.killed_at) == 2 * (4 + 3 + 2)
    # Not all of them were idle.
    assert engines.busy_deaths >= 1
