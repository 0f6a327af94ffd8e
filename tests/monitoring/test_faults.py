"""Each alert fires by its fault, and by no other: a real Prometheus with our rules, whose times are shortened by
``tests/prometheus.py``, reads the real ``/metrics`` of a real HTTP ingress.

Gateways, directory, data plane, ingress and all that counts are real. Stand-ins are the engines, which are simulated,
and those who tell the directory and the gateway of starts and of batches: Ray Serve with its replicas, the scaler,
the batch executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hycluster.batch_api.lateness import Lateness
from hycluster.core import GenerationRequest, Priority, Sampling
from hycluster.directory.autoscaling import Scaling
from hycluster.errors import Overloaded, Unavailable
from hycluster.ledger.tally import ProjectTally
from hycluster.monitoring.alerts import BURN_RATES, alerts
from hycluster.observe.ingresses import certificate_taken
from hycluster.observe.ledger import ledger_metrics
from hycluster.settings.ingress import Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.objectives import Objectives
from hycluster.settings.pool import Replicas
from hycluster.settings.simulated import Simulated
from tests.prometheus import Prometheus, hastened, prometheus
from tests.simulated_pool import SimulatedPool
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("vllm_imported")]

# A window of five minutes is 7.5 s, a wait of an hour 6 s. A scrape takes some time on a busy machine.
WINDOWS, WAITS, SCRAPES_EVERY_S = 40, 600, 2.0
# What calm engines keep on a busy machine.
OBJECTIVES = Objectives(first_token_s=1.0)
CONTEXT_TOKENS = 512
CALM = Simulated(vocab_size=256, max_model_len=CONTEXT_TOKENS, step_base_s=0.02)
JOB = "batch_1"

UNANSWERED = {f"HyclusterUnanswered{speed}" for speed in BURN_RATES}
UNAVAILABLE = {"HyclusterModelUnavailable", "HyclusterReplicasMissing"}
# By model, whose fault is below in the function of that name, what fires.
FIRES = {
    "calm": set(),
    "dead": UNANSWERED | UNAVAILABLE,
    "late": {f"HyclusterFirstTokenLate{speed}" for speed in BURN_RATES},
    "short": {"HyclusterReplicasMissing"},
    "dying": {"HyclusterReplicasDying"},
    "hung": {"HyclusterReplicaHung"},
    "asleep": {"HyclusterNothingWakes", "HyclusterReplicaDoesNotStart"} | UNAVAILABLE,
    "full": {"HyclusterKvPressure"},
    "crowded": {"HyclusterShedding"},
    "broken": {"HyclusterServerErrors"},
    "behind": {"HyclusterBatchLate"},
}
SILENT = "HyclusterSilent"
OF_NO_MODEL = {"HyclusterCertificateEnds", "HyclusterLedgerBehind", "HyclusterLedgerLoses"}


class Cluster:
    """Gateways of models, each with its fault, and those who ask them."""

    def __init__(self, source: Path, stack: contextlib.AsyncExitStack, others: asyncio.TaskGroup) -> None:
        self.gateways: dict[str, Gateway] = {}
        self.pools: dict[str, SimulatedPool] = {}
        self.callers_and_faults: list[asyncio.Task[None]] = []
        self._source = source
        self._stack = stack
        self._others = others

    async def serve(
        self,
        name: str,
        engine: Simulated = CALM,
        pool: Replicas = Replicas(),  # noqa: B008 - it can't change
        admission: Admission = Admission(),  # noqa: B008
    ) -> Any:
        """One more model, when all of its replicas are connected; returns its directory."""
        from hycluster.gateway.opening import open_gateway

        model = Model(
            name=name,
            source=str(self._source),
            simulated=engine,
            engine={"max_model_len": CONTEXT_TOKENS},
            replicas=pool,
        )
        self.pools[name] = simulated = self._stack.enter_context(SimulatedPool(engine, pool.min))
        directory = simulated.directory(model)
        # Whose replicas are all lost hears so soon.
        opening = open_gateway(
            model, directory, router=Router(failover_wait_s=0.5), admission=admission, wait_s=None, metrics=True
        )
        self.gateways[name] = await self._stack.enter_async_context(opening)
        await self.connected(name, pool.min)
        return directory

    async def connected(self, name: str, replicas: int) -> None:
        await until(lambda: self.gateways[name].engine_core.links == replicas)

    async def kill(self, name: str, number: int) -> None:
        """One replica; returns when that has been noticed."""
        replica = self.pools[name][number]
        left = self.gateways[name].engine_core.links - 1
        replica.die()
        await self.connected(name, left)
        # As the directory would forget it by and by.
        replica.accepting = False

    def callers(self, name: str, number: int, tokens: int = 8, **asked: Any) -> None:
        """So many who ask one thing after the other."""
        from hycluster.gateway.generation import Generator

        generator = Generator({name: self.gateways[name]})
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)

        async def ask() -> None:
            with contextlib.suppress(Overloaded, Unavailable):
                await generator.generate(GenerationRequest(model=name, token_ids=[1, 2, 3], sampling=sampling, **asked))

        for _ in range(number):
            self.again(ask, 0.25)

    def again(self, do: Callable[[], Coroutine[Any, Any, Any]], pause_s: float = 0.5) -> None:
        """Have it done again and again."""

        async def repeat() -> None:
            while True:
                await do()
                await asyncio.sleep(pause_s)

        self.callers_and_faults.append(self._others.create_task(repeat()))


async def calm(cluster: Cluster) -> None:
    """Nothing is wrong."""
    await cluster.serve("calm", pool=Replicas(min=2))
    cluster.callers("calm", 2)


async def dead(cluster: Cluster) -> None:
    """The only replica is killed, and none takes its place."""
    await cluster.serve("dead")
    cluster.callers("dead", 2)
    await cluster.kill("dead", 0)


async def late(cluster: Cluster) -> None:
    """A queue before an engine that computes one request at a time."""
    await cluster.serve("late", CALM.model_copy(update={"max_num_seqs": 1}))
    cluster.callers("late", 6, tokens=30)


async def short(cluster: Cluster) -> None:
    """One of two replicas is killed, and none takes its place."""
    await cluster.serve("short", pool=Replicas(min=2))
    await cluster.kill("short", 1)


async def dying(cluster: Cluster) -> None:
    """A replica is killed as soon as another one is there."""
    await cluster.serve("dying")
    pool = cluster.pools["dying"]

    async def replace() -> None:
        pool.start()
        await cluster.connected("dying", 2)
        await cluster.kill("dying", len(pool.replicas) - 2)

    cluster.again(replace, 3)


async def hung(cluster: Cluster) -> None:
    """An engine has work, and does not step."""
    await cluster.serve("hung")
    cluster.pools["hung"][0].engine.hang()
    cluster.callers("hung", 1)


async def asleep(cluster: Cluster) -> None:
    """Somebody waits for a pool that sleeps; its scaler wants a replica, and no start succeeds."""
    directory = (await cluster.serve("asleep", pool=Replicas(min=0, max=1))).known
    cluster.callers("asleep", 1)

    async def start() -> None:
        load = directory.scale("asleep", Scaling(target=1, running=1))
        if load.waiting_requests:
            directory.begin_start(cluster.gateways["asleep"].model, "actor")
            directory.start_failed(cluster.gateways["asleep"].model, "actor", "EngineStartFailed", "no memory")

    cluster.again(start)


async def full(cluster: Cluster) -> None:
    """A KV cache that two requests fill; a third one waits."""
    small = {"block_size_tokens": CONTEXT_TOKENS, "kv_blocks": 2, "step_base_s": 0.05}
    await cluster.serve("full", CALM.model_copy(update=small))
    cluster.callers("full", 3, tokens=CONTEXT_TOKENS - 8)


async def crowded(cluster: Cluster) -> None:
    """More callers than are admitted."""
    await cluster.serve("crowded", admission=Admission(max_requests=1))
    cluster.callers("crowded", 4, tokens=20)


async def broken(cluster: Cluster) -> None:
    """A bug: what the ingress calls raises what nobody expects. :func:`opened` asks, by HTTP."""
    await cluster.serve("broken")

    def bug(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    cluster.gateways["broken"].generate = bug  # type: ignore[method-assign]


async def behind(cluster: Cluster) -> None:
    """A batch whose rows take longer than its window leaves."""
    await cluster.serve("behind", CALM.model_copy(update={"step_base_s": 0.1}))
    cluster.callers("behind", 1, tokens=CONTEXT_TOKENS - 8, priority=Priority.BATCH, job=JOB)
    ends_at = time.time() + 20
    lateness = Lateness(20, ends_at)

    async def look() -> None:
        cluster.gateways["behind"].bulk.shared_lane(JOB).urgent_at = (
            ends_at if lateness.late(done=0, left=10, now=time.time()) else None
        )

    cluster.again(look)


class FullDisk:
    """What an ingress process's ledger tells that can't be written or committed."""

    entries = 0

    def __init__(self) -> None:
        self.tally = ProjectTally()
        self._since_s = time.monotonic()

    @property
    def lost(self) -> int:
        return int(10 * (time.monotonic() - self._since_s))

    def lag_s(self) -> float:
        return 3600.0


@contextlib.asynccontextmanager
async def opened(source: Path) -> AsyncIterator[tuple[str, Callable[[], Coroutine[Any, Any, None]]]]:
    """The faulty cluster: where its HTTP ingress is, and what closes that."""
    from hycluster.gateway.generation import Generator
    from hycluster.ingress.http import serve_http

    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as others:
        cluster = Cluster(source, stack, others)
        certificate_taken(time.time() + 86400)
        stack.callback(certificate_taken, 0)
        # Shown for as long as it lives, which is as long as this is open.
        full_disk = FullDisk()
        ledger_metrics.watch("", full_disk)
        for fault in (calm, dead, late, short, dying, hung, asleep, full, crowded, broken, behind):
            await fault(cluster)
        # Which shows what this process has, whatever models it serves itself.
        ingress = await serve_http(
            Generator({"broken": cluster.gateways["broken"]}), Http(host="127.0.0.1", port=0), drain_timeout_s=1
        )
        stack.push_async_callback(ingress.stop)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingress.port}"))

        async def ask() -> None:
            # Not any more once it is closed.
            with contextlib.suppress(httpx.TransportError):
                answer = await http.post("/v1/completions", json={"model": "broken", "prompt": "x"})
                assert answer.status_code == 500

        cluster.again(ask)
        yield f"127.0.0.1:{ingress.port}", ingress.stop
        for task in cluster.callers_and_faults:
            task.cancel()


async def test_each_fires_by_its_fault_and_by_no_other(tiny_model: Path, tmp_path: Path) -> None:
    assert set().union(*FIRES.values(), {SILENT}, OF_NO_MODEL) == {alert.name for alert in alerts(OBJECTIVES)}
    rules = hastened(OBJECTIVES, windows=WINDOWS, waits=WAITS)
    async with opened(tiny_model) as (target, close):
        with prometheus([target], tmp_path, rules, SCRAPES_EVERY_S) as running:
            wanted = {(name, model) for model, names in FIRES.items() for name in names} | {
                (name, "") for name in OF_NO_MODEL
            }
            await fires(running, wanted)
            await close()
            # What looks back furthest goes on to fire.
            await fires(running, {(SILENT, "")}, besides=wanted)


async def fires(running: Prometheus, wanted: set[tuple[str, str]], besides: Iterable[tuple[str, str]] = ()) -> None:
    """Wait until these alerts fire for these models, and nothing else does."""
    found: set[tuple[str, str]] = set()
    try:
        async with asyncio.timeout(150):
            while not wanted <= found <= wanted | set(besides):
                await asyncio.sleep(SCRAPES_EVERY_S)
                series = await asyncio.to_thread(running.query, 'ALERTS{alertstate="firing"}')
                found = {(one["metric"]["alertname"], one["metric"].get("model", "")) for one in series}
    except TimeoutError:
        raise AssertionError(f"too many: {found - wanted}; too few: {wanted - found}") from None
