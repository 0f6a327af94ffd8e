"""vLLM's own metrics: two gateways over two simulated replicas, and which of them vLLM's scheduler makes."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import Priority
from hycluster.errors import Unavailable
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.gateways import KnownReplica
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.settings.simulated import Simulated
from hycluster.traffic import GatewayTraffic, Minute, TrafficMeter
from tests.simulated_pool import SimulatedPool, SimulatedReplica
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, decode_token_s=0.002)
PROMPT = list(range(40, 60))


@contextlib.asynccontextmanager
async def gateways(tiny_model: Path) -> AsyncIterator[tuple[list[Gateway], SimulatedPool]]:
    """Two, as of two ingress processes, that follow one directory."""
    from hycluster.gateway.opening import open_gateway

    model = Model(
        name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512}, replicas=Replicas(min=2)
    )
    with SimulatedPool(ENGINE, 2) as pool:
        directory = pool.directory(model)
        async with contextlib.AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(
                    open_gateway(model, directory, router=Router(), admission=Admission(), wait_s=60, metrics=metrics)
                )
                # The last one is a job's.
                for metrics in (True, True, False)
            ]
            await until(lambda: all(gateway.engine_core.links == 2 for gateway in opened))
            yield opened, pool


async def ask(
    gateway: Gateway, request_id: str, max_tokens: int = 5, priority: Priority = Priority.ONLINE, n: int = 1
) -> None:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n)
    async for _ in gateway.generate({"prompt_token_ids": PROMPT}, params, request_id, priority=int(priority)):
        pass


def shown(*opened: Gateway) -> Counter[tuple[str, str]]:
    """By name and replica, over these gateways."""
    found: Counter[tuple[str, str]] = Counter()
    for gateway in opened:
        stats: Any = gateway.logger_manager
        for family in stats.families("tiny"):
            for sample in family.samples:
                assert sample.labels["model"] == "tiny"
                assert ("ingress" in sample.labels) == (("request" in sample.name and "num_requests" not in sample.name)
                    or any(word in sample.name for word in ("token", "preemptions", "mm_cache"))), sample  # fmt: skip
                assert sample.labels.get("ingress", INGRESS) == INGRESS
                found[sample.name, sample.labels["replica"]] += sample.value
    return found


async def test_sums_over_gateways_and_replicas_are_what_was_asked(tiny_model: Path) -> None:
    async with gateways(tiny_model) as (opened, pool):
        one, two, job = opened
        await asyncio.gather(*(ask(opened[number % 3], str(number)) for number in range(30)))
        # The job's gateway shows nothing.
        assert job.logger_manager is None
        whole = shown(one, two)
        assert whole["vllm:request_success_total", "r0"] + whole["vllm:request_success_total", "r1"] == 20
        assert min(whole["vllm:request_success_total", replica] for replica in ("r0", "r1")) > 0
        assert sum(whole["vllm:generation_tokens_total", replica] for replica in ("r0", "r1")) == 20 * 5
        assert sum(whole["vllm:request_prompt_tokens_sum", replica] for replica in ("r0", "r1")) == 20 * len(PROMPT)
        assert sum(replica.routed for gateway in (one, two) for replica in gateway.engine_core.known) == 20
        # What concerns the pool one of them shows: so many run as there are, whoever asked.
        running = [asyncio.create_task(ask(gateway, "long", 400)) for gateway in opened]
        await until(lambda: sum(replica.requests for replica in pool.replicas) == 3)
        await until(lambda: sum(shown(one, two)["vllm:num_requests_running", name] for name in ("r0", "r1")) == 3)
        assert [gateway.engine_core.shows_pool for gateway in opened] == [True, False, False]
        assert shown(two)["vllm:num_requests_running", "r0"] == 0
        # A replica dies: what it counted stays, its gauges do not, and each request is counted once.
        counted = shown(one, two)["vllm:request_success_total", "r0"]
        pool[0].die()
        await asyncio.gather(*running)
        await until(lambda: ("vllm:num_requests_running", "r0") not in shown(one, two))
        whole = shown(one, two)
        assert whole["vllm:request_success_total", "r0"] == counted
        assert whole["vllm:request_success_total", "r0"] + whole["vllm:request_success_total", "r1"] == 22
        assert [gateway.engine_core.replicas_lost for gateway in opened] == [1, 1, 1]
        # As long as the directory names it, and no longer than that.
        assert [gateway.health.lost for gateway in opened] == [{"r0"}] * 3
        pool[0].accepting = False
        await until(lambda: not any(gateway.health.lost for gateway in opened))


async def test_rows_of_batch_work_are_counted_apart(tiny_model: Path) -> None:
    """In the same steps, and whatever becomes of them: nobody waits for their first token."""
    async with gateways(tiny_model) as (opened, pool):
        gateway = opened[0]
        stats: Any = gateway.logger_manager

        def counted() -> Counter[tuple[str, str]]:
            """By name and priority."""
            found: Counter[tuple[str, str]] = Counter()
            for family in stats.families("tiny"):
                for sample in family.samples:
                    found[sample.name, sample.labels.get("priority", "")] += sample.value
            return found

        assert ("vllm:time_to_first_token_seconds_count", "online") in counted()
        assert not [name for name, priority in counted() if priority == "batch"]
        rows = [asyncio.create_task(ask(gateway, f"row-{number}", 40, Priority.BATCH, n=2)) for number in range(5)]
        await asyncio.gather(*(ask(gateway, str(number), 20) for number in range(7)), *rows)
        found = counted()
        for name, online, batch in (
            ("vllm:time_to_first_token_seconds_count", 7, 10),
            ("vllm:request_success_total", 7, 10),
            ("vllm:generation_tokens_total", 7 * 20, 10 * 40),
            ("vllm:inter_token_latency_seconds_count", 7 * 19, 10 * 39),
            ("vllm:request_prompt_tokens_sum", 7 * len(PROMPT), 10 * len(PROMPT)),
        ):
            assert (found[name, "online"], found[name, "batch"]) == (online, batch), name
        (online_hour,) = _summed(gateway.traffic.online)
        (batch_hour,) = _summed(gateway.traffic.batch)
        assert (online_hour.answered, online_hour.output_tokens, sum(online_hour.ttft.values())) == (7, 140, 7)
        assert (batch_hour.answered, batch_hour.output_tokens, sum(batch_hour.ttft.values())) == (10, 400, 10)
        # Who leaves, too.
        leaving = [
            asyncio.create_task(ask(gateway, f"leaves-{priority}", 400, priority, n=1 + (priority > 0)))
            for priority in (Priority.ONLINE, Priority.BATCH)
        ]
        await until(lambda: sum(replica.requests for replica in pool.replicas) == 3)
        for each in leaving:
            each.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        assert (gateway.traffic.online.cancelled, gateway.traffic.batch.cancelled) == (1, 2)
        await until(lambda: not any(replica.requests for replica in pool.replicas))
        # And those that are lost.
        lost = [
            asyncio.create_task(ask(gateway, f"lost-{priority}", 400, priority))
            for priority in (Priority.ONLINE, Priority.BATCH, Priority.BATCH)
        ]
        await until(lambda: sum(replica.requests for replica in pool.replicas) == 3)
        await gateway.end_requests(Unavailable("this process ends"))
        assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*lost, return_exceptions=True))
        assert (gateway.traffic.online.failed, gateway.traffic.batch.failed) == ({"Unavailable": 1}, {"Unavailable": 2})


def _summed(meter: TrafficMeter) -> list[Minute]:
    whole = Minute()
    for minute in meter.last_hour.values():
        whole.add(minute)
    return [whole]


async def test_replicas_that_come_and_go_leave_no_more_than_a_few_behind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hycluster.gateway import members

    monkeypatch.setattr(members, "REMEMBERED_REPLICAS", 1)
    async with gateways(tiny_model) as (opened, pool):
        core = opened[0].engine_core

        async def comes(replica_id: str) -> None:
            pool.replicas.append(SimulatedReplica(ENGINE, replica_id))
            await until(lambda: core.links == 3)

        async def goes(replica_id: str) -> None:
            (leaving,) = (each for each in pool.replicas if each.address.replica_id == replica_id)
            pool.replicas.remove(leaving)
            leaving.close()
            await until(lambda: core.links == 2)
            await until(lambda: [known.replica_id for known in core.known if known.gone] == [replica_id])

        await comes("r2")
        await goes("r0")
        # It was away for a moment only, and is gone before r1 all the same.
        await comes("r0")
        await goes("r0")
        await comes("r3")
        await goes("r1")
        # What the last one's scheduler counts comes with its first report.
        await until(lambda: {replica for _, replica in shown(opened[0])} == {"r1", "r2", "r3"})


def test_steps_are_counted_as_vllm_does(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, and of each by itself what vLLM's logger says."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, MultiModalCacheStats, PrefillStats

    from hycluster.engine.vllm import engine_config
    from hycluster.engine.vllm_metrics import ENGINE, FRONT_END, PrivateLogger
    from hycluster.observe import vllm_requests

    def steps() -> list[IterationStats]:
        draw = random.Random(3)
        made = [IterationStats() for _ in range(200)]
        for number, step in enumerate(made):
            tokens = step.num_generation_tokens = number % 7
            step.inter_token_latencies_iter = [draw.choice((0.01, 0.025, draw.random())) for _ in range(tokens)]
            if not number % 10:
                step.prompt_token_stats.update_from_output(
                    PrefillStats(
                        num_prompt_tokens=30, num_computed_tokens=9, num_cached_tokens=21, num_local_cached_tokens=16,
                        num_external_cached_tokens=5,
                    )
                )  # fmt: skip
                step.time_to_first_tokens_iter = [draw.random(), 0.1]
            if not number % 9:
                step.num_preempted_reqs = 2
                step.max_num_generation_tokens_iter, step.n_params_iter = [7, 9], [1, 3]
                step.finished_requests = [
                    FinishedRequestStats(
                        reason, "r", draw.random(), number, number % 2, tokens, 20, 0.1, 0.2, 0.3, draw.random(), 0.02
                    )
                    for reason in (FinishReason.STOP, FinishReason.LENGTH)
                ]
        return made

    def told(families: Iterable[Any]) -> dict[str, float]:
        samples = [sample for family in families for sample in family.samples if family.name in FRONT_END]
        return {
            f"{one.name} {one.labels}": one.value
            for one in samples
            if not one.name.endswith("_created")
        }  # fmt: skip

    config = engine_config(Model(name="tiny", source=str(tiny_model)), str(tiny_model))
    one_by_one = PrivateLogger(config)
    pool: Any = SimpleNamespace(known=[KnownReplica(0, "r0")], shows_pool=False)
    stats = vllm_requests.ModelStats(config, pool, GatewayTraffic())
    monkeypatch.setattr(vllm_requests, "STEPS_AT_ONCE", 64)
    waited = 0
    images = MultiModalCacheStats()
    images.queries, images.hits = 3, 2
    for step in steps():
        one_by_one.logger.record(None, step, images, ENGINE)
        stats.record(None, step, images)
        waited = max(waited, len(stats._uncounted[0].tokens))
    assert waited == 63
    directly = told(family for collector in one_by_one.families for family in collector.collect())
    labels = {"model": "tiny", "replica": "r0", "priority": "online", "ingress": INGRESS}

    def renamed(name: str) -> str:
        said, _, own = name.partition(" ")
        return f"{said} {ast.literal_eval(own) | labels}"

    together = told(stats.families("tiny"))
    assert len([value for value in directly.values() if value]) > 100
    assert together == pytest.approx({renamed(name): value for name, value in directly.items()})
    # None is counted twice by being looked at.
    assert told(stats.families("tiny")) == together


def test_no_step_waits_behind_many_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.stats import IterationStats

    from hycluster.engine.vllm import engine_config
    from hycluster.observe import vllm_requests

    config = engine_config(Model(name="tiny", source=str(tiny_model)), str(tiny_model))
    pool: Any = SimpleNamespace(known=[KnownReplica(0, "r0")], shows_pool=False)
    stats = vllm_requests.ModelStats(config, pool, GatewayTraffic())
    monkeypatch.setattr(vllm_requests, "LATENCIES_AT_ONCE", 100)
    for _ in range(10):
        step = IterationStats()
        step.num_generation_tokens, step.inter_token_latencies_iter = 30, [0.1] * 30
        stats.record(None, step)
        assert len(stats._uncounted[0].latencies_s) < 100


def test_whatever_else_a_step_has_is_told_at_once() -> None:
    from vllm.v1.metrics.stats import IterationStats, PromptTokenStats

    from hycluster.observe.vllm_requests import _only_decodes

    assert _only_decodes(IterationStats())
    for name, value in vars(IterationStats()).items():
        stats: Any = IterationStats()
        setattr(stats, name, PromptTokenStats(total=1) if name == "prompt_token_stats" else 1 if value == 0 else [1])
        waits = name in ("iteration_timestamp", "num_generation_tokens", "inter_token_latencies_iter")
        assert _only_decodes(stats) == waits, name


def test_which_metrics_are_the_schedulers(tiny_model: Path) -> None:
    """``hycluster/engine/vllm_metrics.py`` knows them by name: none is counted twice, and none by nobody."""
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, PrefixCacheStats, SchedulerStats

    from hycluster.engine.vllm import engine_config
    from hycluster.engine.vllm_metrics import ENGINE, FRONT_END, NEVER, PrivateLogger, SchedulerMetrics

    config = engine_config(Model(name="tiny", source=str(tiny_model)), str(tiny_model))
    made = PrivateLogger(config)

    def values() -> dict[str, list[float]]:
        return {
            family.name: [one.value for one in family.samples if not one.name.endswith("_created")]
            for collector in made.families
            for family in collector.collect()
        }

    before = values()
    assert before.keys() - {"vllm:corrupted_requests", "vllm:watermark_requests"} >= FRONT_END - {
        "vllm:corrupted_requests", "vllm:watermark_requests",
    }  # fmt: skip
    stats = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5, prefix_cache_stats=PrefixCacheStats()
    )
    stats.prefix_cache_stats.queries, stats.prefix_cache_stats.hits = 10, 4
    made.logger.record(stats, None, engine_idx=ENGINE)
    of_scheduler = {name for name, found in values().items() if found != before[name]}
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits"} <= of_scheduler
    assert not of_scheduler & (FRONT_END | NEVER)
    before = values()
    iteration = IterationStats()
    iteration.num_generation_tokens = iteration.num_preempted_reqs = 1
    iteration.time_to_first_tokens_iter = iteration.inter_token_latencies_iter = [0.5]
    iteration.max_num_generation_tokens_iter = iteration.n_params_iter = [1]
    iteration.finished_requests = [
        FinishedRequestStats(
            finish_reason=next(iter(made.logger.counter_request_success)), request_id="r", max_tokens_param=4
        )
    ]
    made.logger.record(None, iteration, engine_idx=ENGINE)
    of_front_end = {name for name, found in values().items() if found != before[name]}
    assert {"vllm:request_success", "vllm:time_to_first_token_seconds", "vllm:num_preemptions"} <= of_front_end
    assert of_front_end <= FRONT_END
    # And what a replica says of itself: of requests that were aborted, no step tells.
    said = SchedulerMetrics(config).samples(running=1, waiting=3, deferred=1, kv_usage=0.25, sleep_level=0, requests=[])
    found = {(name, dict(labels).get("reason")): value for name, labels, value in said}
    assert found["vllm:num_requests_running", None] == 1
    assert found["vllm:num_requests_waiting", None] == 3
    assert found["vllm:num_requests_waiting_by_reason", "deferred"] == 1
    assert found["vllm:kv_cache_usage_perc", None] == 0.25
    sizes = next(dict(labels) for name, labels, _ in said if name == "vllm:cache_config_info")
    assert {"block_size", "num_gpu_blocks"} <= sizes.keys()
    # It travels twice a second with each report.
    assert len(said) < 60
