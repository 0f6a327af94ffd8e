"""Tenants in one engine, on vLLM's own scheduler in virtual time: one that is greedy, and nine that are not."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import Priority
from hycluster.engine.fairness import MOST_IDLE, OUTPUT_COST, payer_headers
from hycluster.settings.model import Colocation, Model
from hycluster.settings.simulated import Simulated

if TYPE_CHECKING:
    from hycluster.simulate.engine import VirtualEngine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

# About a large model on GPUs: a step reads the weights, some hundred tokens more make it longer.
GPU = Simulated(
    step_base_s=0.016, prefill_token_s=6e-5, decode_token_s=6e-5, kv_token_s=2e-9, max_num_seqs=32,
    max_num_batched_tokens=1024, kv_blocks=8192, max_model_len=16384,
)  # fmt: skip
# About a small one on a CPU, where a row and a token of KV cache cost much beside a step.
CPU = GPU.model_copy(
    update={"step_base_s": 1.3e-3, "prefill_token_s": 1.6e-5, "decode_token_s": 5e-5, "kv_token_s": 5e-8}
)
SECONDS, RATE, MODEST = 60.0, 1.0, 9
# As much of it as of the other in as many steps.
CPU_SECONDS, CPU_RATE, CPU_SETTLED_S = 10.0, 3.2, 2.0
# An engine that has just started does not know its steps, nor who is greedy.
SETTLED_S = 5.0
GREEDY = "greedy"


@dataclass(frozen=True)
class Endless:
    """So many requests of a tenant are always there. Ranges are in tokens."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]


# Ways to be greedy.
MANY = Endless(300, (200, 400), (50, 150))
LONG_PROMPTS = Endless(50, (6000, 9000), (20, 50))
LONG_OUTPUTS = Endless(200, (20, 50), (800, 1000))
ALL_KINDS = Endless(100, (100, 9000), (50, 500))


def engine(kind: Simulated = GPU, **changed: int) -> VirtualEngine:
    from hycluster.simulate.engine import VirtualEngine
    from hycluster.simulate.machine import simulated_machine

    machine = simulated_machine(Model(name="m", source="nowhere"), kind.model_copy(update=changed), "test")
    return VirtualEngine(machine.config(Colocation()), machine.kv_blocks, machine.step_time, machine.experts)


@dataclass
class Run:
    """What became of requests; by their names."""

    engine: VirtualEngine
    weights: Mapping[str, float] = field(default_factory=dict)
    come: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    prompt: dict[str, int] = field(default_factory=dict)
    # By tenant, tokens as they are charged.
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(
        self,
        tenant: str,
        prompt: int,
        output: int,
        at_s: float | None = None,
        *,
        payer: bool = True,
        priority: Priority = Priority.ONLINE,
    ) -> str:
        name = f"{tenant}-{len(self.come)}"
        self.come[name] = self.engine.now_s if at_s is None else at_s
        self.owner[name], self.prompt[name] = tenant, prompt
        tokens = [len(self.come), *((i * 31) % 250 for i in range(prompt - 1))]
        paid = (tenant, self.weights.get(tenant, 1.0)) if payer else None
        self.engine.add(name, tokens, output, priority, self.come[name], paid)
        return name

    def step(self) -> list[str]:
        """Names of those that have ended."""
        ended = []
        for token in self.engine.step():
            name = token.request_id
            self.served[self.owner[name]] += OUTPUT_COST if name in self.first else self.prompt[name]
            self.first.setdefault(name, token.at_s)
            if token.last:
                self.over[name] = token.at_s
                ended.append(name)
        return ended

    def serve(
        self,
        coming: Sequence[tuple[float, str, int, int]],
        endless: Mapping[str, Endless],
        *,
        payer: bool = True,
        seconds: float = SECONDS,
    ) -> None:
        chance = random.Random(7)

        def more(tenant: str) -> None:
            self.add(tenant, chance.randint(*endless[tenant].prompt), chance.randint(*endless[tenant].output))

        for tenant, kind in endless.items():
            for _ in range(kind.requests):
                more(tenant)
        waiting = iter(coming)
        after = next(waiting, None)
        while self.engine.now_s < seconds:
            while after is not None and after[0] <= self.engine.now_s:
                at_s, tenant, prompt, output = after
                self.add(tenant, prompt, output, at_s, payer=payer)
                after = next(waiting, None)
            if self.engine.has_work:
                for name in self.step():
                    if self.owner[name] in endless:
                        more(self.owner[name])
            elif after is not None:
                self.engine.now_s = after[0]
            else:
                return

    def ttft_s(self, settled_s: float = SETTLED_S) -> list[float]:
        """Of the modest ones, in order; those that have no token yet have waited until now."""
        names = [name for name, at_s in self.come.items() if self.owner[name] != GREEDY and at_s >= settled_s]
        return sorted(self.first.get(name, self.engine.now_s) - self.come[name] for name in names)

    def p99_s(self, settled_s: float = SETTLED_S) -> float:
        found = self.ttft_s(settled_s)
        return found[int(0.99 * len(found))]


def modest(rate: float = RATE, seconds: float = SECONDS) -> list[tuple[float, str, int, int]]:
    chance, coming = random.Random(1), []
    for number in range(MODEST):
        times = itertools.accumulate(chance.expovariate(rate) for _ in itertools.count())
        coming += [
            (at_s, f"modest {number}", chance.randint(100, 600), chance.randint(20, 120))
            for at_s in itertools.takewhile(lambda at_s: at_s < seconds, times)
        ]
    return sorted(coming)


@pytest.fixture(scope="module")
def alone() -> float:
    """The modest ones' p99 of TTFT without the greedy one."""
    run = Run(engine())
    run.serve(modest(), {})
    return run.p99_s()


@pytest.fixture(scope="module")
def alone_on_a_cpu() -> float:
    """The same there."""
    run = Run(engine(CPU))
    run.serve(modest(CPU_RATE, CPU_SECONDS), {}, seconds=CPU_SECONDS)
    return run.p99_s(CPU_SETTLED_S)


@pytest.mark.parametrize(
    "greedy", [MANY, LONG_PROMPTS, LONG_OUTPUTS, ALL_KINDS], ids=["many", "long prompts", "long outputs", "all kinds"]
)
def test_nobody_waits_for_one_that_is_greedy(alone: float, greedy: Endless) -> None:
    run = Run(engine())
    run.serve(modest(), {GREEDY: greedy})
    assert run.p99_s() <= 1.10 * alone
    # Who asks for more than his share gets what the others leave.
    assert run.served[GREEDY] > max(served for tenant, served in run.served.items() if tenant != GREEDY)


@pytest.mark.parametrize(
    "greedy", [MANY, LONG_PROMPTS, LONG_OUTPUTS, ALL_KINDS], ids=["many", "long prompts", "long outputs", "all kinds"]
)
def test_nor_where_each_row_costs_much(alone_on_a_cpu: float, greedy: Endless) -> None:
    """All slots that the others leave would make their steps twice as long."""
    beside = Run(engine(CPU))
    beside.serve(modest(CPU_RATE, CPU_SECONDS), {GREEDY: greedy}, seconds=CPU_SECONDS)
    assert beside.p99_s(CPU_SETTLED_S) <= 1.10 * alone_on_a_cpu
    # It gets more than anybody else all the same.
    assert beside.served[GREEDY] > 2 * max(beside.served[tenant] for tenant in beside.served if tenant != GREEDY)


def test_without_tenants_they_wait_for_it(alone: float) -> None:
    """What the tests above are about."""
    run = Run(engine())
    names = {GREEDY: MANY}
    original = run.add
    run.add = lambda *a, **k: original(*a, **{**k, "payer": False})  # type: ignore[method-assign]
    run.serve(modest(), names)
    assert run.p99_s() > 50 * alone


@pytest.mark.parametrize(
    "kinds", [(MANY, MANY, MANY), (MANY, LONG_OUTPUTS, LONG_PROMPTS)], ids=["alike", "of all kinds"]
)
def test_who_always_wants_more_is_served_by_weight(kinds: tuple[Endless, ...]) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    run = Run(engine(), weights)
    run.serve([], dict(zip(weights, kinds, strict=True)))
    from hycluster.engine.waiting import bill_of

    accounts = {bill.account for each in run.engine.scheduler.requests.values() if (bill := bill_of(each)) is not None}
    served = {account.tenant: account.served for account in accounts}
    mean = sum(served.values()) / 3
    # By weight already. Over a run without an end what one is ahead by, which is bounded, is nothing.
    assert {tenant: pytest.approx(mean, rel=0.05) for tenant in weights} == served


def test_a_tenants_own_requests_stay_in_their_order() -> None:
    run = Run(engine(max_num_seqs=4))
    for number in range(20):
        for tenant in ("a", "b"):
            run.add(tenant, 50, 10, number / 1000)
    while run.engine.has_work:
        run.step()
    for tenant in ("a", "b"):
        names = [name for name in run.come if run.owner[name] == tenant]
        assert sorted(names, key=lambda name: run.first[name]) == names


def test_slots_are_given_up_down_to_ones_share_and_once() -> None:
    run = Run(engine(max_num_seqs=8))
    for _ in range(20):
        run.add("a", 50, 400)
    for _ in range(5):
        run.step()
    come = [run.add("b", 50, 20) for _ in range(6)]
    run.step()
    scheduler = run.engine.scheduler
    rows = Counter(run.owner[request.request_id] for request in scheduler.running)
    assert rows == {"a": 4, "b": 4}
    while not set(come) <= run.over.keys():
        run.step()
    assert sum(request.num_preemptions for request in scheduler.requests.values()) <= 6, "as many as came, at most"
    # Nothing is lost.
    while run.engine.has_work:
        run.step()
    assert run.over.keys() == run.come.keys()


@pytest.mark.parametrize("blocks", [64, 256], ids=lambda blocks: f"{blocks} blocks")
def test_blocks_that_one_has_filled_are_shared(blocks: int) -> None:
    run = Run(engine(kv_blocks=blocks, max_num_seqs=16))
    for _ in range(30):
        run.add("a", blocks * 2, 100)
    for _ in range(20):
        run.step()
    began_s = run.engine.now_s
    name = run.add("b", blocks * 3, 10)
    while name not in run.over:
        run.step()
    assert run.first[name] - began_s < 0.2
    while run.engine.has_work:
        run.step()
    assert run.over.keys() == run.come.keys()


@dataclass
class Row:
    """As much of a request of vLLM's as is looked at."""

    request_id: str
    trace_headers: dict[str, str] | None
    num_computed_tokens: int
    num_tokens: int = 400
    priority: int = Priority.ONLINE
    arrival_time: float = 0.0


def test_one_that_holds_blocks_and_is_no_row_yet_finds_no_more() -> None:
    """As where blocks were fetched from the host: it waits elsewhere, and others may have all that is left."""
    from hycluster.engine.shares import TenantShares
    from hycluster.engine.step_time import StepTime
    from hycluster.engine.waiting import WaitingRequests, take_payer

    shares = TenantShares(WaitingRequests(), 4, 1000, 100)
    greedy, modest, fetched = rows = [Row(name, payer_headers(name, 1.0), 0) for name in ("greedy", "modest", "back")]
    for row, tokens in zip(rows, (600, 100, 200), strict=True):
        take_payer(row)  # type: ignore[arg-type]
        shares.come(row, [])  # type: ignore[arg-type]
        row.num_computed_tokens = tokens
    running: list[Any] = [greedy, modest]
    shares.begin(running, 0.0, StepTime())
    assert shares.victim(fetched, running, lambda _: True) is greedy  # type: ignore[arg-type, comparison-overlap]


def test_nobody_makes_way_for_one_whose_adapter_has_no_place() -> None:
    """Else the row would come back in the next step, and make way in the one after."""
    from vllm.lora.request import LoRARequest

    from hycluster.engine.waiting import take_payer

    run = Run(engine(max_num_seqs=4))
    scheduler: Any = run.engine.scheduler
    scheduler.lora_config = SimpleNamespace(max_loras=1)

    def add(tenant: str, adapter: int, output: int) -> None:
        name = f"{tenant}-{len(run.come)}"
        run.come[name], run.owner[name], run.prompt[name] = run.engine.now_s, tenant, 40
        tokens = [len(run.come), *range(39)]
        request: Any = run.engine.made(name, tokens, output, Priority.ONLINE, run.engine.now_s)
        request.lora_request = LoRARequest(str(adapter), adapter, "nowhere")
        request.trace_headers = payer_headers(tenant, 1.0)
        take_payer(request)
        run.engine.add_made(request)

    for _ in range(4):
        add("a", 1, 100)
    run.step()
    add("b", 2, 10)
    gave_up: list[Any] = []
    real = scheduler._tenants.gave_up

    def noted(row: Any) -> None:
        gave_up.append(row)
        real(row)

    scheduler._tenants.gave_up = noted
    while run.engine.has_work:
        run.step()
    assert run.over.keys() == run.come.keys()
    assert not gave_up


def test_of_thousands_that_wait_few_are_looked_at() -> None:
    """In each step: else one that has them there would make everybody's steps longer."""
    run = Run(engine(max_num_seqs=8))
    for number in range(3000):
        run.add("greedy", 100 + number % 7, 50)
    for _ in range(5):
        run.add("modest", 100, 50)
    looked = 0
    scheduler: Any = run.engine.scheduler
    real = scheduler._is_blocked_waiting_status

    def counted(status: Any) -> bool:
        nonlocal looked
        looked += 1
        return bool(real(status))

    scheduler._is_blocked_waiting_status = counted
    for _ in range(20):
        run.step()
    assert run.first
    assert looked < 20 * 100


def test_one_s_own_come_in_the_order_in_which_they_would_be_served() -> None:
    from hycluster.engine.shares import _in_order

    for seed in range(20):
        chance = random.Random(seed)
        heap: Any = [chance.randint(0, 50) for _ in range(chance.randint(0, 200))]
        heapq.heapify(heap)
        assert list(_in_order(heap)) == sorted(heap)


def test_one_alone_is_not_asked_about_and_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.engine.scheduler import ColocationScheduler

    def had(run: Run, tenant: str) -> Any:
        scheduler: Any = run.engine.scheduler
        return scheduler._tenants._online._accounts[tenant]

    seen: list[dict[str, float]] = []
    for asks in (False, True):
        with monkeypatch.context() as patch:
            if asks:
                patch.setattr(ColocationScheduler, "_alone", False)
            run = Run(engine(max_num_seqs=8))
            # With beginnings that are cached, prompts of several steps, and who pays for nothing.
            for number in range(40):
                run.add(GREEDY, 100 + 500 * (number % 5), 10 + number % 30, payer=number % 10 > 0)
            for _ in range(20):
                run.step()
            assert ("_reserve_prefill_lookahead" in vars(run.engine.scheduler)) is not asks
            while len(run.over) < 30:
                run.step()
            seen.append({"served": had(run, GREEDY).served, "recent": had(run, GREEDY).recent, **run.over})
            run.add("modest", 100, 20)
            run.step()
            assert "_reserve_prefill_lookahead" not in vars(run.engine.scheduler)
            while run.engine.has_work:
                run.step()
            assert 0 < had(run, "modest").served < had(run, GREEDY).served
    assert seen[0] == pytest.approx(seen[1])


def test_tenants_of_bulk_work_are_forgotten_too() -> None:
    from hycluster.engine.shares import TenantShares
    from hycluster.engine.step_time import StepTime
    from hycluster.engine.waiting import WaitingRequests, take_payer

    shares = TenantShares(WaitingRequests(), 4, 1000, 100)
    for number in range(3 * MOST_IDLE):
        row: Any = Row(str(number), payer_headers(str(number), 1.0), 0, priority=Priority.BATCH)
        take_payer(row)
        shares.come(row, [])
        shares.begin([row], 0.0, StepTime())
        assert len(shares._bulk) <= MOST_IDLE + 1


@pytest.mark.parametrize("seed", range(3))
def test_nothing_stays_of_those_who_leave(seed: int) -> None:
    """Whatever they are at: waiting, in the slots, given up for others."""
    from vllm.v1.request import RequestStatus

    chance, left = random.Random(seed), set[str]()
    run = Run(engine(kv_blocks=128, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=1024))
    for _ in range(150):
        for _ in range(2):
            run.add(
                chance.choice("abcd"),
                chance.randint(1, 700),
                chance.randint(1, 120),
                payer=chance.random() < 0.8,
                priority=chance.choice((Priority.ONLINE, Priority.ONLINE, Priority.BATCH)),
            )
        there = sorted(run.come.keys() - run.over.keys() - left)
        gone = set(chance.sample(there, min(len(there), chance.randint(0, 3))))
        run.engine.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
        left |= gone
        for _ in range(chance.randint(0, 6)):
            if run.engine.has_work:
                run.step()
    while run.engine.has_work:
        run.step()
    assert run.over.keys() | left == run.come.keys()
    scheduler: Any = run.engine.scheduler
    assert not scheduler.running
    assert not len(scheduler._waiting)
    assert not scheduler._waiting._lines


@pytest.mark.parametrize("seed", range(3))
def test_everything_ends_whatever_comes(seed: int) -> None:
    """Few slots, few blocks; online and bulk, of tenants and of nobody."""
    chance = random.Random(seed)
    run = Run(engine(kv_blocks=128, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=1024))
    for _ in range(150):
        run.add(
            chance.choice("abcd"),
            chance.randint(2, 700),
            chance.randint(1, 120),
            payer=chance.random() < 0.8,
            priority=chance.choice((Priority.ONLINE, Priority.ONLINE, Priority.BATCH)),
        )
        for _ in range(chance.randint(0, 6)):
            if run.engine.has_work:
                run.step()
    while run.engine.has_work:
        run.step()
    assert run.over.keys() == run.come.keys()
