"""A made cluster: two pools, one with a replica that starts and one that failed; an hour of traffic; batches."""

from __future__ import annotations

import math
from decimal import Decimal

from hycluster.auth.limits import BILLION, Limit
from hycluster.core import BulkDemand, ColocationLoad, ReplicaAddress, ReplicaLoad
from hycluster.directory.directory import IngressReport, Overview, PoolView, ReplicaReport, Survey
from hycluster.directory.faults import ReplicaFault
from hycluster.directory.starts import StageTime, StartingReplica
from hycluster.ledger.usage import UsageSum
from hycluster.pool_health import PoolHealth, StartTrouble
from hycluster.settings.model import Model
from hycluster.settings.pool import Replicas
from hycluster.state.cluster_state import BatchState, ClusterState, cluster_state
from hycluster.state.usage_state import DAY_S, HOUR_S, UsageState, limits_usage, span_usage
from hycluster.traffic import Minute, ModelTraffic, class_of

# 2026-11-29 12:00 UTC.
NOW = 1795953600.0
BIG, SMALL = "tencent/Hunyuan-A13B-Instruct", "smollm2-135m-instruct"
SECRET = "a-replica's-secret"


def replica(name: str, model: str, *, running: int, kv: float, accepting: bool = True) -> ReplicaReport:
    load = ReplicaLoad(
        running=running,
        waiting=max(0, running - 60),
        most_running=64,
        kv_usage=kv,
        outstanding_tokens={"g0": 700 * running, "g1": 41},
        colocation=ColocationLoad(parked=2, bulk_running=8, real_step_s=0.0312),
        samples=(
            ("vllm:prefix_cache_queries_total", (("engine", "0"),), 1000.0),
            ("vllm:prefix_cache_hits_total", (("engine", "0"),), 640.0),
        ),
    )
    endpoint = f"tcp://10.0.0.{int(name[:2], 16) % 90}:7000"
    address = ReplicaAddress(name, model, endpoint, endpoint, SECRET, client_secret=SECRET)
    return ReplicaReport(address, load, accepting)


def traffic(scale: int) -> ModelTraffic:
    minutes: dict[int, Minute] = {}
    for ago in range(60):
        asked = round(scale * (1.4 + math.sin(ago / 6)))
        bad = 3 if ago in (17, 18) else 0
        waits = {class_of(0.12 + 0.04 * math.cos(ago / 4)): asked, class_of(0.6 + (ago == 18)): 1 + asked // 20}
        minutes[int(NOW // 60) - ago] = Minute(
            answered=asked,
            cancelled=int(ago == 3),
            failed=bad,
            shed=2 * bad,
            unavailable=bad,
            prompt_tokens=900 * asked,
            cached_tokens=400 * asked,
            output_tokens=180 * asked,
            ttft=waits,
            tpot={class_of(0.021): asked},
        )
    now = int(NOW // 60)
    rows = {now - ago: Minute(answered=40, shed=2, output_tokens=4000, ttft={class_of(90.0): 40}) for ago in range(5)}
    return ModelTraffic(minutes, rows)


def made_survey() -> Survey:
    big = PoolView(
        Model(name=BIG, source="/models/a13b", replicas=Replicas(min=4)),
        [
            replica("a1b2c3d4e5f60718", BIG, running=41, kv=0.62),
            replica("0f1e2d3c4b5a6978", BIG, running=63, kv=0.94),
        ],
        trouble=StartTrouble(2, "EngineStartFailed", "CUDA out of memory: 80 GiB asked, 12 GiB free", 8.0),
        bulk={"g0": {"summaries-s3://corpus/out": BulkDemand(24, more=True)}, "g1": {"batch_9": BulkDemand(3)}},
    )
    return Survey(
        Overview(
            7,
            {BIG: 2, SMALL: 1},
            {BIG: big.trouble} if big.trouble else {},
            starting={BIG: (StartingReplica("77aa88bb99cc", (StageTime("weights", 41.2), StageTime("engine", 12.6))),)},
        ),
        {
            BIG: big,
            SMALL: PoolView(Model(name=SMALL, source="x"), [replica("5c5c5c5c5c5c5c5c", SMALL, running=3, kv=0.04)]),
        },
        [IngressReport("n1", "10.0.0.5:9000", True)],
        {BIG: [traffic(20), traffic(14)], SMALL: [traffic(3)]},
        [
            ReplicaFault(NOW - 95, BIG, "e6f7a8b9c0d1", "did not start: CUDA out of memory: 80 GiB asked, 12 GiB free"),
            ReplicaFault(NOW - 1080, BIG, "d1c0b9a8f7e6", "lost: has said nothing for 10 s"),
        ],
    )


def made_batches() -> list[BatchState]:
    ids = [f"batch_019ad{number:x}c2f{'4b7e' * 7}"[:42] for number in range(1, 5)]
    return [
        BatchState(ids[3], "/v1/chat/completions", BIG, "in_progress", 48_000, 31_250, 12, int(NOW) - 5400,
                   int(NOW) + 81_000, None, ""),
        BatchState(ids[2], "/v1/chat/completions", SMALL, "in_progress", 900, 40, 0, int(NOW) - 600,
                   int(NOW) + 1100, None, "waits for online traffic"),
        BatchState(ids[1], "/v1/embeddings", None, "failed", 0, 0, 0, int(NOW) - 9000, int(NOW) + 77_400,
                   int(NOW) - 8990, "line 3: body.model: 'gpt-9' is not served here"),
        BatchState(ids[0], "/v1/chat/completions", BIG, "completed", 1200, 1200, 0, int(NOW) - 20_000,
                   int(NOW) + 66_400, int(NOW) - 17_300, ""),
    ]  # fmt: skip


def made_pools() -> dict[str, PoolHealth]:
    return {BIG: PoolHealth(2, 4, trouble=made_survey().overview.troubles[BIG]), SMALL: PoolHealth(1, 1)}


def made_state() -> ClusterState:
    return cluster_state(made_survey(), made_pools(), version="0.1.0", batches=made_batches(), now=NOW)


def usage_sum(tenant: str, project: str, requests: int, cost: str) -> UsageSum:
    group = {"tenant": tenant, "project": project}
    return UsageSum(group, None, requests, 900 * requests, 400 * requests, 180 * requests, Decimal(cost))


LIMITS = (
    Limit("acme", "search", tokens_per_minute=100_000, budget_per_month=500 * BILLION),
    Limit("acme", model=BIG, concurrent_requests=32),
    Limit("labs", tokens_per_day=20_000_000),
    Limit("labs", "notebooks", "key_5b2e", requests_per_minute=60),
)


def made_usage() -> UsageState:
    hour = [
        usage_sum("acme", "search", 3412, "12.31"), usage_sum("acme", "assistant", 208, "0.84"),
        usage_sum("labs", "notebooks", 61, "0.0021"),
    ]  # fmt: skip
    day = [
        usage_sum("acme", "search", 71_204, "256.90"), usage_sum("acme", "assistant", 9_871, "35.62"),
        usage_sum("labs", "notebooks", 2_310, "0.074"), usage_sum("labs", "evals", 15_400, "0"),
    ]  # fmt: skip
    used = {
        ("project:acme/search", "tokens_per_minute"): 97_400,
        (f"tenant:acme|{BIG}", "concurrent_requests"): 27,
        ("key:key_5b2e", "requests_per_minute"): 4,
    }
    spent = {
        ("project:acme/search", "budget_per_month", "2026-11"): 461 * BILLION,
        ("tenant:labs", "tokens_per_day", "2026-11-29"): 18_300_000,
    }
    spans = (span_usage(HOUR_S, hour), span_usage(DAY_S, day))
    return UsageState(NOW, "usd", spans, tuple(limits_usage(LIMITS, used, spent, lambda _: "notebook", NOW)))
