"""What a gateway knows of its replicas, as the policies by KV blocks see it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from hycluster.core import ColocationLoad, GatewayWork, ReplicaLoad
from hycluster.gateway.columns import pool_columns
from hycluster.gateway.router import BY_BLOCKS, ByBlocks, RouteRequest, make_policy
from hycluster.gateway.sent_work import SentWork, work_of_others

REQUEST = RouteRequest(tokens=1100, prompt_tokens=1000, output_tokens=100, prefix=3, session_id="s")
BULK = RouteRequest(tokens=1100, prompt_tokens=1000, output_tokens=100, bulk=True)
NO_WORK = GatewayWork()


@dataclass
class Replica:
    """A link's figures, and what is known of its replica's KV cache."""

    replica_id: str
    cached: int = 0
    sent: GatewayWork = NO_WORK
    load: ReplicaLoad | None = None
    age_s: float = np.inf
    outstanding_tokens: int = 0
    gateway: str = "me"
    work: SentWork = field(init=False)
    others: array[float] = field(init=False)

    def __post_init__(self) -> None:
        sent = self.sent
        self.work, self.others = SentWork(), work_of_others(self.load, self.gateway)
        self.work.row[:] = array(
            "d",
            (
                sent.prefill_tokens,
                sent.requests,
                sent.decoding,
                sent.kv_tokens,
                sent.bulk_prefill_tokens,
                self.outstanding_tokens,
            ),
        )
        assert self.work.told == sent


def choose(
    pool: Sequence[Replica], request: RouteRequest = REQUEST, name: str = "predicted_ttft", seed: int = 0
) -> str:
    policy = make_policy(name, "me", seed, session_slack_tokens=100, step_tokens=1000)
    assert isinstance(policy, ByBlocks)
    cached, ages = np.array([each.cached for each in pool], float), np.array([each.age_s for each in pool])
    columns = pool_columns(
        pool, [each.replica_id for each in pool], cached, ages, step_tokens=policy.step_tokens, bulk=request.bulk
    )
    return pool[policy.place(columns, request)].replica_id


@pytest.mark.parametrize("name", sorted(set(BY_BLOCKS) - {"prefix_hash"}))
def test_they_go_where_the_prefix_is(name: str) -> None:
    pool = [Replica(str(number), 900 * (number == 2)) for number in range(4)]
    assert {choose(pool, name=name, seed=seed) for seed in range(5)} == {"2"}


def test_each_figure_is_this_gateways_and_that_of_others() -> None:
    said = ReplicaLoad(
        work={"me": GatewayWork(*[9000] * 5), "a": GatewayWork(1, 2, 3, 4, 5), "b": GatewayWork(10, 20, 30, 40, 50)},
        outstanding_tokens={"me": 9000, "a": 6, "b": 60},
    )
    pool = [
        Replica("said", load=said, sent=GatewayWork(100, 200, 300, 400, 500), outstanding_tokens=600),
        Replica("new"),
    ]
    for bulk, prefill in ((False, 111), (True, 666)):
        columns = pool_columns(pool, ["said", "new"], np.zeros(2), np.zeros(2), step_tokens=1, bulk=bulk)
        assert columns.prefill_tokens.tolist() == [prefill, 0]
    assert columns.replica_ids == ["said", "new"]
    for column, value in (
        (columns.requests, 222),
        (columns.decoding, 333),
        (columns.kv_tokens, 444),
        (columns.outstanding_tokens, 666),
    ):
        assert column.tolist() == [value, 0]


@pytest.mark.parametrize("name", ["predicted_ttft", "lmetric", "dynamo"])
def test_what_others_have_there_counts_and_ones_own_once(name: str) -> None:
    def pool(gateway: str) -> list[Replica]:
        said = ReplicaLoad(work={gateway: GatewayWork(prefill_tokens=9000, requests=9, kv_tokens=9000)})
        return [Replica("said", 10, load=said), Replica("idle")]

    assert choose(pool("you"), name=name) == "idle"
    assert choose(pool("me"), name=name) == "said"


def test_a_burst_at_two_gateways_does_not_run_to_one_replica() -> None:
    """One has all of the prompt; what each gateway has sent it knows at once, what the other has by reports."""
    sent = {gateway: dict.fromkeys("abc", NO_WORK) for gateway in ("me", "you")}
    reported = {replica: ReplicaLoad() for replica in "abc"}
    for number in range(60):
        if number % 10 == 9:
            reported = {
                replica: ReplicaLoad(work={gateway: sent[gateway][replica] for gateway in sent}) for replica in "abc"
            }
        gateway = ("me", "you")[number % 2]
        pool = [
            Replica(replica, 900 if replica == "a" else 0, sent[gateway][replica], reported[replica], gateway=gateway)
            for replica in "abc"
        ]
        chosen = choose(pool, seed=number)
        was, new = sent[gateway][chosen], 100 if chosen == "a" else 1000
        sent[gateway][chosen] = GatewayWork(was.prefill_tokens + new, was.requests + 1)
    queues = {replica: sum(of[replica].prefill_tokens for of in sent.values()) for replica in "abc"}
    counts = {replica: sum(of[replica].requests for of in sent.values()) for replica in "abc"}
    assert counts["a"] > 30 > counts["b"] > 0 < counts["c"]
    # What it costs to compute it elsewhere, four times over, and what came between two reports.
    assert max(queues.values()) <= 4 * 900 + 10 * 1000


def test_how_long_steps_take_is_what_a_replica_has_learned() -> None:
    """Where rows that decode make steps long, the prefix is left for a replica without them."""
    slow = ReplicaLoad(colocation=ColocationLoad(step_time_s=(0.01, 1e-6, 1.0, 0.0)))

    def chosen(load: ReplicaLoad | None) -> str:
        rows = GatewayWork(requests=4, decoding=4)
        return choose([Replica("rows", 100, rows, load), Replica("idle")])

    assert (chosen(None), chosen(slow)) == ("rows", "idle")
    # It has learned nothing yet.
    assert chosen(ReplicaLoad(colocation=ColocationLoad())) == "rows"


def test_what_would_go_for_it_counts() -> None:
    pool = [Replica(replica, age_s=age_s) for replica, age_s in (("a", 1), ("b", 99))]
    assert {choose(pool, seed=seed) for seed in range(5)} == {"b"}


def test_what_bulk_rows_have_to_prefill_is_before_other_bulk_rows_only() -> None:
    pool = [Replica("bulk", 500, GatewayWork(bulk_prefill_tokens=90_000, requests=9)), Replica("idle")]
    assert choose(pool) == "bulk"
    assert choose(pool, BULK) == "idle"
