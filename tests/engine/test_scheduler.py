"""Online and bulk rows on vLLM's own scheduler, in virtual time: a step is 70 ms, a row 12 ms, a prompt's token 3."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import ColocationLoad, Priority
from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.step_time import StepWork
from hycluster.settings.model import Colocation, Model
from hycluster.timeline import GIVEN_UP, PARKED_S

if TYPE_CHECKING:
    from hycluster.simulate.engine import VirtualEngine

pytestmark = pytest.mark.usefixtures("vllm_imported")

SLOTS, BLOCKS, BLOCK_TOKENS = 16, 256, 16


def step_time(work: StepWork) -> float:
    return 0.07 + 0.003 * work.prefill_tokens + 0.012 * work.sequences


def on_gpu(work: StepWork) -> float:
    """16 ms for the weights, or 125 us a token from the 129th on; and the KV cache."""
    return max(0.016, 1.25e-4 * (work.prefill_tokens + work.sequences)) + 2e-7 * work.kv_tokens


@dataclass
class Case:
    """An engine, and when each request came, got its first token and each token after it."""

    engine: VirtualEngine
    come: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, prompt: int, tokens: int, priority: Priority) -> None:
        number = len(self.come)
        self.come[name] = self.engine.now_s
        # Prompts without a common prefix.
        self.engine.add(name, [3 + (number * 7919 + i * 31) % 250 for i in range(prompt)], tokens, int(priority))

    def step(self) -> None:
        for token in self.engine.step():
            self.tokens.setdefault(token.request_id, []).append(token.at_s)
            if token.last:
                self.over[token.request_id] = token.at_s

    def until(self, at_s: float) -> None:
        while self.engine.now_s < at_s:
            if self.engine.has_work:
                self.step()
            else:
                self.engine.now_s = at_s

    def finish(self, *names: str) -> None:
        while not set(names) <= self.over.keys():
            self.step()

    def ttft(self, name: str) -> float:
        return self.tokens[name][0] - self.come[name]

    def itl(self, name: str) -> list[float]:
        times = self.tokens[name]
        return [after - before for before, after in itertools.pairwise(times)]

    @property
    def load(self) -> ColocationLoad:
        from hycluster.engine.scheduler import colocation_load

        load = colocation_load(self.engine.scheduler)
        assert load is not None
        return load


@pytest.fixture
def case(tiny_model: Path, request: pytest.FixtureRequest) -> Case:
    return make_case(tiny_model, **getattr(request, "param", {}))


def make_case(
    folder: Path,
    *,
    blocks: int = BLOCKS,
    asynchronous: bool = False,
    engine: dict[str, object] | None = None,
    seconds: Callable[[StepWork], float] = step_time,
    experts: RoutedWeights | None = None,
    **colocation: float | bool,
) -> Case:
    from hycluster.engine.scheduler import use_colocation
    from hycluster.engine.vllm import engine_config
    from hycluster.simulate.engine import VirtualEngine

    arguments = {
        "max_model_len": 2048,
        "max_num_seqs": SLOTS,
        "max_num_batched_tokens": 512,
        "block_size": BLOCK_TOKENS,
        **(engine or {}),
    }
    settings = Colocation.model_validate(colocation)
    config = engine_config(Model(name="m", source=str(folder), engine=arguments, colocation=settings), str(folder))
    if asynchronous:
        config.scheduler_config.async_scheduling, config.scheduler_config.scheduler_cls = True, None
        use_colocation(config, settings)
    return Case(VirtualEngine(config, blocks, seconds, experts))


def told_aside(case: Case) -> dict[str, tuple[float, int]]:
    """By row, for how long it was left out of steps and how often it was given up, as it says with its tokens."""
    return {
        name: (float(request.trace_headers[PARKED_S]), int(request.trace_headers[GIVEN_UP]))
        for name, request in case.engine.scheduler.requests.items()
        if request.trace_headers
    }


def fill_with_bulk(case: Case, count: int = 64, tokens: int = 40) -> None:
    for number in range(count):
        case.add(f"bulk-{number}", 30, tokens, Priority.BATCH)


@pytest.mark.parametrize("case", [{}, {"asynchronous": True}], indirect=True, ids=["sync", "async"])
def test_an_online_request_waits_for_one_bounded_step(case: Case) -> None:
    fill_with_bulk(case)
    case.until(8)
    # It comes at the end of a step; one more is in flight where they are scheduled ahead.
    waits_s = max((flight.end_s for flight in case.engine._flights), default=case.engine.now_s) - case.engine.now_s
    ahead = case.engine.scheduler.vllm_config.max_concurrent_batches - 1
    assert ahead * 0.7 * Colocation().max_step_s / 2 <= waits_s <= ahead * Colocation().max_step_s / 2
    case.add("online", 60, 20, Priority.ONLINE)
    case.finish("online")
    assert case.ttft("online") - waits_s <= 1.1 * step_time(StepWork(59, 1)), "then it is in the next one"
    assert max(case.itl("online")) <= 1.1 * step_time(StepWork(0, 1))
    load = case.load
    assert 0 < load.parked <= load.bulk_running
    # All that have not ended are somewhere.
    assert load.bulk_running + load.bulk_waiting == 64 - len(case.over.keys() - {"online"})


def test_without_it_an_online_request_waits_for_all_that_run(tiny_model: Path) -> None:
    case = make_case(tiny_model, enabled=False)
    fill_with_bulk(case)
    case.until(8)
    case.add("online", 60, 20, Priority.ONLINE)
    case.finish("online")
    assert case.ttft("online") > 1, "vLLM's own scheduler has mended this: read its release notes"


@pytest.mark.parametrize("case", [{}, {"asynchronous": True}], indirect=True, ids=["sync", "async"])
def test_steps_with_bulk_only_are_cut_to_what_an_arrival_may_wait(case: Case) -> None:
    fill_with_bulk(case)
    case.until(3)
    lengths = []
    while case.engine.now_s < 20:
        begun = case.engine.now_s
        case.step()
        lengths.append(case.engine.now_s - begun)
    bound = 0.25 / max(1, case.engine.scheduler.vllm_config.max_concurrent_batches)
    assert max(lengths) <= 1.1 * bound
    assert sum(lengths) / len(lengths) >= 0.75 * bound, "and filled, but for what is less than a row"


@pytest.mark.parametrize("case", [{"max_step_s": 1.0}], indirect=True)
def test_slots_of_bulk_rows_go_to_online_requests(case: Case) -> None:
    for number in range(SLOTS):
        case.add(f"bulk-{number}", 4, 400, Priority.BATCH)
    case.until(10)
    assert case.engine.scheduler.get_request_counts() == (SLOTS, 0)
    for number in range(SLOTS):
        case.add(f"online-{number}", 8, 4, Priority.ONLINE)
    case.step()
    assert all(f"online-{number}" in case.tokens for number in range(SLOTS)), "in the next step"
    assert case.load.given_up == SLOTS


def test_rows_are_asked_about_again_when_bulk_comes(case: Case) -> None:
    scheduler = case.engine.scheduler
    case.add("before", 60, 5, Priority.ONLINE)
    case.finish("before")
    assert "_reserve_prefill_lookahead" in vars(scheduler), "vLLM's own, while nobody makes room"
    fill_with_bulk(case)
    case.until(case.engine.now_s + 8)
    assert "_reserve_prefill_lookahead" not in vars(scheduler)
    case.add("online", 60, 20, Priority.ONLINE)
    case.finish("online")
    assert max(case.itl("online")) <= 1.1 * step_time(StepWork(0, 1))


@pytest.mark.parametrize("case", [{"max_step_s": 1.0}], indirect=True)
def test_a_slot_stays_free_for_who_is_not_ready_yet(case: Case) -> None:
    """As while its grammar is compiled; it must not be handed to bulk, taken back, and handed out again."""
    from vllm.v1.request import RequestStatus

    for number in range(SLOTS + 4):
        case.add(f"bulk-{number}", 4, 400, Priority.BATCH)
    case.until(10)
    case.add("online", 8, 4, Priority.ONLINE)
    online = case.engine.scheduler.requests["online"]
    online.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    case.until(13)
    assert case.load.given_up == 1
    online.status = RequestStatus.WAITING
    case.step()
    assert "online" in case.tokens
    assert case.load.given_up == 1


@pytest.mark.parametrize("case", [{"engine": {"enable_lora": True, "max_loras": 2}}], indirect=True)
def test_adapters_of_parked_rows_do_not_count(case: Case) -> None:
    """vLLM asserts that a step has no more adapters than fit."""
    from vllm.lora.request import LoRARequest

    def add(name: str, adapter: int, priority: Priority, tokens: int) -> None:
        case.add(name, 16, tokens, priority)
        case.engine.scheduler.requests[name].lora_request = LoRARequest(f"a{adapter}", adapter, f"/a{adapter}")

    for number in range(8):
        add(f"bulk-{number}", 1 + number % 2, Priority.BATCH, 60)
    case.until(3)
    for number in range(3):
        add(f"online-{number}", 3 + number, Priority.ONLINE, 12)
    case.step()
    assert {name for name in case.tokens if name.startswith("online")} == {"online-0", "online-1"}
    case.finish("online-0", "online-1", "online-2", *(f"bulk-{number}" for number in range(8)))


@pytest.mark.parametrize("case", [{"blocks": 40}], indirect=True)
def test_blocks_of_bulk_rows_go_to_online_requests(case: Case) -> None:
    for number in range(6):
        case.add(f"bulk-{number}", 64, 100, Priority.BATCH)
    case.until(10)
    case.add("online", 480, 30, Priority.ONLINE)
    case.step()
    assert "online" in case.tokens, "30 of 39 blocks, at once"
    assert 0 < case.load.given_up <= 6
    case.finish("online", *(f"bulk-{number}" for number in range(6)))
    assert [len(case.tokens[f"bulk-{number}"]) for number in range(6)] == [100] * 6, "computed again, not told again"


@pytest.mark.parametrize("case", [{"blocks": 40}], indirect=True)
def test_who_has_least_to_compute_again_gives_up_first(case: Case) -> None:
    case.add("far", 160, 200, Priority.BATCH)
    case.until(8)
    case.add("near", 16, 200, Priority.BATCH)
    case.until(9)
    case.add("online", 320, 4, Priority.ONLINE)
    told = len(case.tokens["far"])
    case.finish("online")
    assert case.load.given_up == 1
    case.until(case.engine.now_s + 1)
    assert len(case.tokens["far"]) > told + 3, "it had its blocks still"


def test_online_work_that_never_ends_leaves_bulk_its_share(tiny_model: Path) -> None:
    def told(share: float) -> int:
        case = make_case(tiny_model, min_batch_share=share, max_slowdown=0.0)
        fill_with_bulk(case, 4, tokens=200)
        for number in range(8):
            case.add(f"online-{number}", 20, 1500, Priority.ONLINE)
        case.until(60)
        return sum(len(times) for name, times in case.tokens.items() if name.startswith("bulk"))

    none, tenth = told(0), told(0.1)
    assert none == 0
    assert 0.07 <= tenth * 0.012 / 60 <= 0.11


def test_a_bound_below_the_shortest_step_leaves_bulk_something(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(tiny_model, max_step_s=0.04)
    with caplog.at_level("WARNING"):
        fill_with_bulk(case, 20)
        case.finish(*(f"bulk-{number}" for number in range(20)))
    assert 20 * 40 / case.engine.now_s > 1 / 0.1
    (said,) = [record.message for record in caplog.records if "max_step_s" in record.message]
    assert said.startswith("colocation.max_step_s: a step of one row takes 0.08")
    assert said.endswith("more than the bound leaves (0.040 s): batch requests get little")


def test_what_an_engine_cannot_use_it_for(tiny_model: Path) -> None:
    from hycluster.engine.scheduler import why_not_colocated
    from hycluster.engine.vllm import engine_config

    def why(**engine: object) -> str | None:
        model = Model(name="m", source=str(tiny_model), engine=engine, colocation=Colocation(enabled=False))
        return why_not_colocated(engine_config(model, str(tiny_model)))

    assert why() is None
    assert why(scheduling_policy="fcfs") == "engine.scheduling_policy is 'fcfs', which knows no batch requests"
    own = "vllm.v1.core.sched.scheduler.Scheduler"
    assert why(scheduler_cls=own) == f"its scheduler is {own}"


def test_its_settings_are_none_that_a_model_is_compiled_for(tiny_model: Path) -> None:
    from hycluster.engine.vllm import engine_config

    def hashed(**colocation: float | bool) -> str:
        settings = Colocation.model_validate(colocation)
        model = Model(name="m", source=str(tiny_model), colocation=settings)
        return str(engine_config(model, str(tiny_model)).compute_hash())

    assert hashed() == hashed(max_step_s=1.0) == hashed(enabled=False)


def test_a_rank_with_bulk_only_steps_no_longer_than_its_siblings_online_work(tiny_model: Path) -> None:
    """The second of two ranks, whose steps end together; this one is told of the other."""
    from hycluster.engine.rank_work import ARRIVAL, RankWork
    from hycluster.engine.scheduler import ColocationScheduler

    case, told = make_case(tiny_model), list[RankWork]()
    assert isinstance(case.engine.scheduler, ColocationScheduler)
    siblings = case.engine.scheduler.siblings
    siblings.send = told.append
    fill_with_bulk(case)
    case.until(8)

    def length() -> float:
        begun = case.engine.now_s
        case.step()
        return case.engine.now_s - begun

    assert length() > 0.2
    siblings.hear(0, ARRIVAL)
    assert length() <= 1.1 * step_time(StepWork(0, 1))
    siblings.hear(0, RankWork(sequences=8, online_sequences=8))
    assert step_time(StepWork(0, 8)) <= length() <= 1.1 * step_time(StepWork(0, 8)), "what the longest needs is free"
    siblings.hear(0, RankWork(sequences=8))
    assert length() > 0.2
    assert not any(work.online_sequences for work in told)
    case.add("online", 8, 4, Priority.ONLINE)
    case.step()
    assert told[-1].online_sequences == 1


def test_bulk_alone_loses_little(tiny_model: Path) -> None:
    """A bound above the longest step is as vLLM by itself."""

    def rate(**colocation: Any) -> float:
        case = make_case(tiny_model, **colocation)
        fill_with_bulk(case)
        case.finish(*(f"bulk-{number}" for number in range(64)))
        return 64 * 40 / case.engine.now_s

    assert rate(max_step_s=10) >= 0.95 * rate(enabled=False)


def test_where_tokens_are_free_bulk_rows_take_no_others(tiny_model: Path) -> None:
    """A step with an online prompt in it has none left, and is as long as without them; a step without one has many."""

    from hycluster.engine.scheduler import ColocationScheduler

    def run(bulk: int) -> tuple[list[float], Case]:
        case = make_case(tiny_model, blocks=2000, seconds=on_gpu)
        scheduler = case.engine.scheduler
        assert isinstance(scheduler, ColocationScheduler)
        fill_with_bulk(case, bulk, tokens=60)
        case.until(5)
        case.add("online", 20, 400, Priority.ONLINE)
        for number in range(20):
            case.add(f"prompt-{number}", 400, 2, Priority.ONLINE)
            while f"prompt-{number}" not in case.tokens:
                begun = case.engine.now_s
                case.step()
                length, taken = case.engine.now_s - begun, scheduler._room.taken
                assert not taken or length < 0.02, "beside a prompt"
            case.until(case.engine.now_s + 0.3)
        case.finish("online")
        return case.itl("online"), case

    (alone, _), (beside, case) = run(0), run(600)
    assert sum(beside) <= 1.12 * sum(alone)
    told = [at for name, times in case.tokens.items() if name.startswith("bulk") for at in times]
    assert sum(case.come["online"] < at < case.over["online"] for at in told) > 10 * len(beside)


def test_few_tokens_of_a_model_with_experts_are_not_made_to_wait_for_many_to_be_read(tiny_model: Path) -> None:
    """Two online rows read two of 16 experts, bulk rows all of them; and without them, bulk rows are in every step."""
    experts = RoutedWeights(16, 1, 16, 1, 0.9)

    def seconds(work: StepWork) -> float:
        read_s = 0.0016 + 0.0144 * experts.touched(work.routed_tokens)
        return max(read_s, 1.25e-4 * (work.prefill_tokens + work.sequences)) + 2e-8 * work.kv_tokens

    def run(bulk: int, experts: RoutedWeights | None = experts) -> tuple[float, float]:
        slots: dict[str, object] = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
        case = make_case(tiny_model, blocks=4000, seconds=seconds, experts=experts, engine=slots)
        fill_with_bulk(case, bulk, tokens=60)
        case.until(2)
        begun = case.engine.now_s
        for number in range(2):
            case.add(f"online-{number}", 20, 600, Priority.ONLINE)
        case.finish("online-0", "online-1")
        told = [at for name, times in case.tokens.items() if name.startswith("bulk") for at in times if at > begun]
        return sum(case.itl("online-0")), len(told) / (case.engine.now_s - begun)

    (alone_s, _), (beside_s, rate), (blind_s, _) = run(0), run(900), run(900, None)
    assert beside_s <= 1.13 * alone_s
    assert blind_s > 2 * alone_s, "as a dense model's"
    # Row by row, the share would pay for less than one in two steps.
    assert rate > 600 / beside_s


def test_a_rank_does_not_have_experts_read_for_its_bulk_rows_in_each_of_its_siblings_steps(tiny_model: Path) -> None:
    """The second of two ranks; two online rows on the first one."""
    from hycluster.engine.rank_work import RankWork
    from hycluster.engine.scheduler import ColocationScheduler

    experts = RoutedWeights(16, 1, 8, 2, 0.9)

    def seconds(work: StepWork) -> float:
        read_s = 0.0016 + 0.0144 * experts.touched(work.routed_tokens)
        return max(read_s, 1.25e-4 * (work.prefill_tokens + work.sequences)) + 2e-8 * work.kv_tokens

    slots: dict[str, object] = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    case = make_case(tiny_model, blocks=4000, seconds=seconds, experts=experts, engine=slots)
    assert isinstance(case.engine.scheduler, ColocationScheduler)
    siblings = case.engine.scheduler.siblings
    siblings.send = lambda _: None
    fill_with_bulk(case, 400, tokens=60)
    case.until(2)
    siblings.hear(0, RankWork(sequences=2, online_sequences=2))
    rows = []
    for _ in range(200):
        case.step()
        rows.append(len(case.engine.scheduler._room.taken))
    # In a step without any there would be a dummy row.
    assert min(rows) == 1
    assert 0.8 < rows.count(1) / len(rows) < 1, "saved for"
    assert max(rows) > 5, "and spent at once, as far as there is time for the rows themselves"


def test_a_mixed_hour(tiny_model: Path) -> None:
    """Arrivals at random, bulk without end: TTFT and TPOT against the same arrivals alone."""

    def run(bulk: bool) -> tuple[list[float], list[float], int]:
        case, random_ = make_case(tiny_model), random.Random(7)
        at_s, names = 5.0, list[str]()
        if bulk:
            fill_with_bulk(case, 600, tokens=60)
        while at_s < 200:
            case.until(at_s)
            names.append(f"online-{len(names)}")
            case.add(names[-1], 60, 24, Priority.ONLINE)
            at_s += random_.expovariate(0.25)
        case.finish(*names)
        gaps = sorted(gap for name in names for gap in case.itl(name))
        bulk_tokens = sum(len(times) for name, times in case.tokens.items() if name.startswith("bulk"))
        return sorted(map(case.ttft, names)), gaps, bulk_tokens

    (ttft, gaps, _), (ttft_beside, gaps_beside, bulk_tokens) = run(False), run(True)
    half, most = len(ttft) // 2, int(0.99 * len(ttft))
    assert ttft_beside[half] <= ttft[half] + 0.25
    assert ttft_beside[most] <= ttft[most] + 0.5
    assert gaps_beside[int(0.99 * len(gaps))] <= 1.15 * gaps[int(0.99 * len(gaps))]
    assert bulk_tokens > 2000


@pytest.mark.parametrize("case", [{}, {"asynchronous": True}], indirect=True, ids=["sync", "async"])
def test_a_row_tells_for_how_long_it_was_left_out(case: Case) -> None:
    fill_with_bulk(case, SLOTS, tokens=400)
    case.until(8)
    # A step in which only they run takes no more of them than ``max_step_s`` allows: some sit one out.
    assert max((parked_s for parked_s, _ in told_aside(case).values()), default=0) < 0.2
    come_s = case.engine.now_s
    for number in range(4):
        case.add(f"online-{number}", 60, 20, Priority.ONLINE)
    case.finish(*(f"online-{number}" for number in range(4)))
    beside_s = case.engine.now_s - come_s
    case.until(case.engine.now_s + 20)
    said = told_aside(case)
    # Some are left out for longer, until another row of the job is done: a step has no room for all of them.
    assert any(0.3 * beside_s < parked_s <= 1.1 * beside_s for parked_s, _ in said.values())
    # Each that made room for one of the four says so.
    assert sum(given_up for _, given_up in said.values()) == case.load.given_up <= 4
    assert not {name for name in said if name.startswith("online")}


def test_what_is_kept_aside_goes_with_its_rows(case: Case) -> None:
    fill_with_bulk(case, SLOTS, tokens=20)
    case.until(2)
    case.add("online", 60, 20, Priority.ONLINE)
    case.finish(*case.come)
    fill = len(case.come)
    for number in range(3):
        case.add(f"later-{number}", 30, 5, Priority.BATCH)
    assert fill == SLOTS + 1
    case.finish(*case.come)
    assert len(case.engine.scheduler._set_aside) <= 2 * 3  # type: ignore[attr-defined]
