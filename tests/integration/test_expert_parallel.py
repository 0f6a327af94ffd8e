"""Replicas that span processes: tensor + expert and data + expert parallel give what one rank gives.

On Serve, beside the session's cluster if that runs, or on a small Ray cluster of its own; without ingress processes,
through the pool's gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from hycluster.app import replicas
from hycluster.core import Priority
from hycluster.directory.directory import NAMESPACE, ReplicaReport, open_directory
from hycluster.engine.scratch import folders
from hycluster.models.tiny import TinyShape, write_checkpoint
from hycluster.settings.load import Admission, DataPlane, Router
from hycluster.settings.model import Colocation, Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Hardware
from hycluster.settings.settings import Settings
from tests.families import title_of, words_below
from tests.integration.conftest import eventually, gather_bounded
from tests.models.hunyuan_reference import Reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_imported")]

PROMPTS = [[(7 * step + 11 * length) % 256 for step in range(length)] for length in (1, 3, 9, 40, 90, 150)]
MAX_TOKENS = 12
LONG = 300
START_S = 240
TENSOR, DATA = "tensor", "data"
CUTS = {TENSOR: Parallel(tensor=2, expert=True), DATA: Parallel(data=2, expert=True)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "model", TinyShape(layers=4, topk=2))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    reference = Reference.load(checkpoint)
    return [reference.greedy(prompt, MAX_TOKENS)[0] for prompt in PROMPTS]


@dataclass(frozen=True)
class Deployed:
    """Two pools of one replica each."""

    models: dict[str, Model]
    directory: Any

    def reports(self, name: str) -> list[ReplicaReport]:
        return list(ray.get(self.directory.view.remote(name)).replicas)

    def pids(self, name: str) -> list[int]:
        """The actors' processes, rank 0 first."""
        answer = serve.get_app_handle(name).ready.remote().result(timeout_s=30)
        return list(answer["pids"])

    def processes(self, name: str) -> list[psutil.Process]:
        """All of the replica's processes, those below its actors too."""
        actors = [psutil.Process(pid) for pid in self.pids(name)]
        return actors + [child for actor in actors for child in words_below(actor.pid)]

    def wait_until_complete(self, name: str, without: frozenset[str] = frozenset()) -> None:
        """Until as many ranks as there should be take requests, none of them among ``without``."""

        def complete() -> bool:
            there = {report.address.replica_id for report in self.reports(name) if report.accepting} - without
            return len(there) == self.models[name].engines

        eventually(complete, START_S, f"a complete replica of {name}")

    @contextlib.asynccontextmanager
    async def gateway(self, name: str) -> AsyncIterator[Any]:
        from hycluster.gateway.opening import open_gateway

        model = self.models[name]
        async with open_gateway(
            model, self.directory, router=Router(failover_wait_s=START_S), admission=Admission(), wait_s=START_S
        ) as gateway:
            async with asyncio.timeout(60):
                while gateway.engine_core.links < model.engines:  # noqa: ASYNC110 - the pool tells nobody
                    await asyncio.sleep(0.1)
            yield gateway


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """What these processes use of it, but for Ray's own."""
    paths = {Path(mapped.path) for process in processes for mapped in process.memory_maps()}
    return {path for path in paths if path.parent == Path("/dev/shm") and not path.name.startswith("plasma")}


def engine_processes(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Without the watchdog and what Python starts for itself; first the actor's, then those of vLLM's workers."""
    beside = ("resource_tracker", "watchdog")
    titles = {process: title_of(process) for process in processes}
    found = [process for process, title in titles.items() if title and not any(word in title for word in beside)]
    assert len(found) == 3
    return found


def scratch(processes: list[psutil.Process]) -> set[Path]:
    """The folders that these processes hold for their engines' files."""
    opened = {Path(link) for p in processes for fd in Path(f"/proc/{p.pid}/fd").iterdir() if (link := target(fd))}
    return {path for path in opened if path.parent == folders()}


def target(link: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link)
    return None


@pytest.fixture(scope="module")
def deployed(checkpoint: Path) -> Iterator[Deployed]:
    own_cluster = not ray.is_initialized()
    if own_cluster:
        ray.init(address="local", num_cpus=2, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
        serve.start(proxy_location="Disabled")
    models = {
        name: Model(
            name=name,
            source=str(checkpoint),
            engine={"max_model_len": 512, "max_num_seqs": 8},
            parallel=parallel,
            hardware=Hardware(cpus=0.1, kv_cache_gib=0.05),
            # What waits for online work then shows it.
            colocation=Colocation(max_slowdown=0.0),
        )
        for name, parallel in CUTS.items()
    }
    settings = Settings(models=tuple(models.values()), data_plane=DataPlane(host="127.0.0.1"), drain_timeout_s=5)
    directory_name = f"expert-parallel-{secrets.token_hex(4)}"
    deployed = Deployed(models, open_directory(directory_name))
    try:
        serve.run_many(
            [
                serve.RunTarget(replicas(model, settings, directory_name), name=name, route_prefix=None)
                for name, model in models.items()
            ],
            wait_for_applications_running=False,
        )
        for name in models:
            deployed.wait_until_complete(name)
        yield deployed
    finally:
        for name in models:
            serve.delete(name)
        ray.kill(deployed.directory)
        if own_cluster:
            serve.shutdown()
            ray.shutdown()


def sampling(max_tokens: int = MAX_TOKENS) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def tokens(
    gateway: Any,
    prompt: list[int],
    max_tokens: int = MAX_TOKENS,
    so_far: dict[str, int] | None = None,
    priority: Priority = Priority.ONLINE,
) -> list[int]:
    """Args: so_far: how many there are, by request; changes as they come."""
    name, params = secrets.token_hex(8), sampling(max_tokens)
    got: list[int] = []
    async for chunk in gateway.generate({"prompt_token_ids": prompt}, params, name, priority=int(priority)):
        got = list(chunk.outputs[0].token_ids)
        if so_far is not None:
            so_far[name] = len(got)
    return got


@pytest.mark.parametrize("name", list(CUTS))
async def test_same_tokens_as_one_rank(deployed: Deployed, expected: list[list[int]], name: str) -> None:
    async with deployed.gateway(name) as gateway:
        alone = [await tokens(gateway, prompt) for prompt in PROMPTS]
        together = await gather_bounded([tokens(gateway, prompt) for prompt in PROMPTS * 2])
    assert alone == expected
    assert together == expected * 2


async def test_both_data_ranks_serve(deployed: Deployed) -> None:
    one, other = deployed.reports(DATA)
    assert one.group == other.group
    assert one.address.replica_id != other.address.replica_id
    assert ray.get(deployed.directory.models.remote())[DATA] == 1, "a group is one replica"
    async with deployed.gateway(DATA) as gateway:
        pool = gateway.engine_core
        calls = [asyncio.ensure_future(tokens(gateway, PROMPTS[3], 40)) for _ in range(4)]
        seen: set[str] = set()
        while not all(call.done() for call in calls):
            seen |= {replica_id for replica_id, outstanding in pool.outstanding.items() if outstanding}
            await asyncio.sleep(0.02)
        assert len({tuple(call.result()) for call in calls}) == 1
    assert seen == {one.address.replica_id, other.address.replica_id}


@pytest.mark.parametrize("name", list(CUTS))
async def test_bulk_waits_on_all_ranks_for_online_work_on_one(deployed: Deployed, name: str) -> None:
    """Ranks step together: those without online work of their own would make the one that has some wait for them."""
    rows = [[(5 * step + 3 * number) % 256 for step in range(20 + number)] for number in range(12)]

    def bulk(gateway: Any) -> list[asyncio.Future[list[int]]]:
        return [asyncio.ensure_future(tokens(gateway, row, 80, priority=Priority.BATCH)) for row in rows]

    def running() -> list[int]:
        return [report.load.running for report in deployed.reports(name)]

    def parked() -> set[str]:
        loads = {report.address.replica_id: report.load.colocation for report in deployed.reports(name)}
        return {replica_id for replica_id, load in loads.items() if load and load.parked}

    def given_up() -> int:
        return sum(report.load.colocation.given_up for report in deployed.reports(name) if report.load.colocation)

    async with deployed.gateway(name) as gateway:
        online_alone, bulk_alone = await tokens(gateway, PROMPTS[3], 80), await asyncio.gather(*bulk(gateway))
        # Reports are up to half a second old: of the rows before, not of those that come now. Online work that comes
        # before the rows run has them wait without a slot, and what has none is not parked.
        await asyncio.to_thread(eventually, lambda: not any(running()), 30, "no rank runs anything")
        beside = bulk(gateway)
        # How many each of them has is for the pool to say.
        await asyncio.to_thread(eventually, lambda: min(running()) >= 2, 150, "all ranks run bulk rows")
        seen: set[str] = set()
        async with asyncio.timeout(150):
            # As long as it takes to be reported: meanwhile hardly a row gets on.
            while len(seen) < deployed.models[name].engines:
                online = asyncio.ensure_future(tokens(gateway, PROMPTS[3], 80))
                while not online.done():
                    seen |= parked()
                    await asyncio.sleep(0.05)
                assert await online == online_alone
        # And as many as there are slots: rows make room, and are computed again.
        before, slots = given_up(), 8 * deployed.models[name].engines
        answers = await gather_bounded([tokens(gateway, PROMPTS[3], 30) for _ in range(slots)])
        assert answers == [online_alone[:30]] * slots
        await asyncio.to_thread(eventually, lambda: given_up() > before, 30, "a rank reports rows that made room")
        assert await asyncio.gather(*beside) == bulk_alone


async def test_cancelling_frees_the_rank_that_ran_it(deployed: Deployed) -> None:
    def free() -> bool:
        return all(not r.load.running and not r.load.kv_usage for r in deployed.reports(DATA))

    def busy() -> list[ReplicaReport]:
        return [report for report in deployed.reports(DATA) if report.load.running and report.load.kv_usage]

    async with deployed.gateway(DATA) as gateway:
        # Reports of what came before are half a second old.
        await asyncio.to_thread(eventually, free, 30, "nothing runs yet")
        call = asyncio.ensure_future(tokens(gateway, PROMPTS[4], 400))
        found = await asyncio.to_thread(eventually, busy, 30, "a rank says that it runs a request")
        assert len(found) == 1
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(eventually, free, 30, "no request and no KV block in use")


@pytest.mark.parametrize("name", list(CUTS))
def test_idle_ranks_sleep(deployed: Deployed, name: str) -> None:
    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def spent_s() -> float:
        before = cpu_s()
        time.sleep(3)
        return cpu_s() - before

    processes = deployed.processes(name)
    # vLLM's workers wait for a second before they go to sleep, and one that spins has 3 s in each of these.
    assert any(spent_s() < 0.6 for _ in range(4))


@pytest.mark.parametrize(("data_rank", "tensor_process"), [(1, 0), (0, 1)])
async def test_a_lost_rank_takes_its_group_along(deployed: Deployed, data_rank: int, tensor_process: int) -> None:
    """Its streams wait for the new group and go on there. One process of each kind is killed."""
    processes = {name: await asyncio.to_thread(deployed.processes, name) for name in CUTS}
    everyone = [process for name in CUTS for process in processes[name]]
    left = shared_memory(everyone) | scratch(everyone)
    assert len(scratch(everyone)) == 3, "two data-parallel ranks, and the actor of the tensor-parallel ones"
    old = {name: frozenset(report.address.replica_id for report in deployed.reports(name)) for name in CUTS}
    async with deployed.gateway(DATA) as data, deployed.gateway(TENSOR) as tensor:
        both = {DATA: data, TENSOR: tensor}
        undisturbed = await asyncio.gather(*(tokens(data, prompt, LONG) for prompt in PROMPTS[2:5]))
        begun: dict[str, int] = {}
        calls = {
            name: [asyncio.ensure_future(tokens(gateway, prompt, LONG, begun)) for prompt in PROMPTS[2:5]]
            for name, gateway in both.items()
        }
        async with asyncio.timeout(60):
            while len(begun) < 6 or min(begun.values()) < 5:  # noqa: ASYNC110 - streams tell nobody
                await asyncio.sleep(0.02)
        assert not any(call.done() for name in CUTS for call in calls[name])
        for process in (processes[DATA][data_rank], engine_processes(processes[TENSOR])[tensor_process]):
            os.kill(process.pid, signal.SIGKILL)
        answers = {name: await asyncio.gather(*calls[name]) for name in CUTS}
    assert answers == {DATA: undisturbed, TENSOR: undisturbed}
    _, alive = await asyncio.to_thread(psutil.wait_procs, everyone, 60)
    assert not alive
    for name in CUTS:
        await asyncio.to_thread(deployed.wait_until_complete, name, without=old[name])
    assert not [path for path in left if path.exists()]


def test_stopping_leaves_nothing_behind(deployed: Deployed) -> None:
    processes = [process for name in CUTS for process in deployed.processes(name)]
    assert len(processes) >= 5
    used = shared_memory(processes)
    assert used
    used |= scratch(processes)
    for name in CUTS:
        serve.delete(name)
    _, alive = psutil.wait_procs(processes, 60)
    assert not alive
    assert not any(deployed.reports(name) for name in CUTS)
    assert not [path for path in used if path.exists()]
