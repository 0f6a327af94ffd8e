"""How many rows a job has in the engines: what these report, in virtual time, and what follows from it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.core import BulkDemand, ColocationLoad, ReplicaLoad
from hycluster.gateway.bulk import FIXED_ROWS, RESERVE_ROWS, STARVED_AFTER_S, BulkLane, BulkLanes, EngineRoom, share_of
from tests.waiting import PATIENCE_S

SLOTS = 16
# Of so many slots.
RESERVE = RESERVE_ROWS


def load(
    running: int = 0,
    waiting: int = 0,
    parked: int = 0,
    online: int = 0,
    *,
    bulk_tokens: int = 0,
    online_tokens: int = 0,
    slots: int = SLOTS,
) -> ReplicaLoad:
    """What an engine reports: bulk rows that run, wait, are parked; online requests."""
    colocation = ColocationLoad(
        parked=parked,
        bulk_running=running,
        bulk_waiting=waiting,
        bulk_tokens=bulk_tokens,
        online_tokens=online_tokens,
    )
    return ReplicaLoad(running=running + online, waiting=waiting, most_running=slots, colocation=colocation)


def room(*reports: ReplicaLoad, held: int = 0, every_s: float = 0.5) -> EngineRoom:
    room = EngineRoom()
    for number, report in enumerate(reports):
        room.note(report, held, number * every_s)
    return room


@pytest.mark.parametrize(
    ("report", "rows"),
    [
        (load(), SLOTS + RESERVE),
        (load(running=16, waiting=3), SLOTS + RESERVE),
        # Online requests have slots that bulk can't have.
        (load(running=6, online=4), SLOTS - 4 + RESERVE),
        # Some have slots, and no time.
        (load(running=16, parked=11), 5 + RESERVE),
        (load(running=10, parked=10, online=6), RESERVE),
        # Slots are free, and rows wait all the same: there are no blocks for them.
        (load(running=3, waiting=9), 3 + RESERVE),
        # One has just come.
        (load(running=3, waiting=1), SLOTS + RESERVE),
        (load(slots=256), 256 + 32),
    ],
)
def test_an_engine_has_room_for_what_it_uses_and_a_reserve(report: ReplicaLoad, rows: int) -> None:
    assert room(report).rows == rows


def test_an_engine_that_does_not_say_has_no_known_room() -> None:
    assert EngineRoom().rows is None
    assert room(load(), ReplicaLoad(running=3, most_running=16)).rows is None
    assert EngineRoom().spare(0) is None


def test_one_online_step_does_not_empty_the_queue() -> None:
    full, parked = load(running=16), load(running=16, parked=16)
    assert room(full, parked, parked).rows == SLOTS + RESERVE
    assert room(full, *[parked] * 11).rows == RESERVE


def test_spare_is_what_nobody_uses() -> None:
    # Of the 12 rows that it reports 4 are this gateway's; 2 more have been sent since.
    assert room(load(running=8, waiting=4), held=4).spare(6) == 8 + RESERVE - 8 - 6


def test_an_engine_starves_bulk_once_it_has_only_online_requests_for_a_while() -> None:
    starving = [load(running=4, parked=4, bulk_tokens=50, online_tokens=100 + n) for n in range(12)]
    last_s = 0.5 * (len(starving) - 1)
    assert room(*starving).starves(last_s)
    assert not room(*starving).starves(STARVED_AFTER_S - 0.1)
    assert not room(*starving, load(running=4, parked=3, bulk_tokens=51, online_tokens=200)).starves(last_s + 0.5)
    # It has none of them, or does nothing at all: that is not for online requests.
    assert not room(*starving, load(online_tokens=200)).starves(last_s + 0.5)
    assert not room(*[load(running=4, bulk_tokens=50, online_tokens=100)] * 12).starves(last_s)


HUNGRY, SATED = BulkDemand(0, more=True), BulkDemand(2)


@pytest.mark.parametrize(
    ("demands", "shares"),
    [
        ({"a": {"j": HUNGRY}}, {"a": 60}),
        ({"a": {"j": HUNGRY}, "b": {"k": HUNGRY}}, {"a": 30, "b": 30}),
        # By job, not by gateway; one that two gateways feed is one.
        ({"a": {"i": HUNGRY, "j": HUNGRY}, "b": {"k": HUNGRY}}, {"a": 40, "b": 20}),
        ({"a": {"j": HUNGRY}, "b": {"j": HUNGRY}, "c": {"k": HUNGRY}}, {"a": 15, "b": 15, "c": 30}),
        # What one does not want, others get; what nobody wants, anybody.
        ({"a": {"j": HUNGRY}, "b": {"k": SATED}}, {"a": 58, "b": 2}),
        ({"a": {"j": SATED}, "b": {"k": SATED}}, {"a": 58, "b": 58}),
        # One that holds too many gives them back as its rows end.
        ({"a": {"j": HUNGRY}, "b": {"k": BulkDemand(50)}}, {"a": 30, "b": 30}),
        # By deadline first.
        ({"a": {"j": HUNGRY}, "b": {"k": BulkDemand(9, more=True, urgent_at=7.0)}}, {"a": 0, "b": 60}),
        (
            {"a": {"j": BulkDemand(9, more=True, urgent_at=9.0)}, "b": {"k": BulkDemand(5, urgent_at=7.0)}},
            {"a": 55, "b": 5},
        ),
        ({}, {"a": 60}),
    ],
)
def test_places_are_shared_by_deadline_and_then_fairly(
    demands: Mapping[str, Mapping[str, BulkDemand]], shares: Mapping[str, int]
) -> None:
    assert {gateway: share_of(gateway, 60, demands) for gateway in shares} == shares


demand_maps = st.dictionaries(
    st.sampled_from("abc"),
    st.dictionaries(
        st.sampled_from("ijk"),
        st.builds(BulkDemand, rows=st.integers(0, 50), more=st.booleans(), urgent_at=st.none() | st.floats(1, 3)),
        min_size=1,
    ),
    min_size=1,
)


@given(rows=st.integers(0, 1000), demands=demand_maps)
def test_as_many_places_are_given_as_there_are(rows: int, demands: dict[str, dict[str, BulkDemand]]) -> None:
    given = sum(share_of(gateway, rows, demands) for gateway in demands)
    if any(demand.more for jobs in demands.values() for demand in jobs.values()):
        # Nothing is left over, but for what rounding cost.
        assert rows - len(demands) < given <= rows
    else:
        assert given >= rows - len(demands)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Gatewayed:
    """A gateway's lanes, and jobs without end at them, whose rows are done when a test says so."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.lanes = BulkLanes(name, clock)
        self.sent: deque[BulkLane] = deque()
        self._jobs: list[asyncio.Task[None]] = []

    def job(self, name: str, *, rows: int = 1_000_000, most: int | None = None) -> BulkLane:
        lane = self.lanes.lane(name, most)
        self._jobs.append(asyncio.create_task(self._feed(lane, rows)))
        return lane

    async def _feed(self, lane: BulkLane, rows: int) -> None:
        for _ in range(rows):
            await lane.acquire()
            self.sent.append(lane)

    async def settle(self) -> None:
        """Let the jobs send all that they may."""
        before = -1
        while before != len(self.sent):
            before = len(self.sent)
            for _ in range(4):
                await asyncio.sleep(0)

    async def end_rows(self, count: int) -> None:
        for _ in range(min(count, len(self.sent))):
            self.sent.popleft().release()
        await self.settle()

    async def close(self) -> None:
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)


async def test_without_reports_it_is_as_many_as_the_settings_say() -> None:
    gateway = Gatewayed("g", Clock())
    free, bound = gateway.job("a"), gateway.lanes.lane("b", 5)
    await gateway.settle()
    assert free.held == FIXED_ROWS
    await gateway.close()
    # A job of its own process has its own.
    gateway = Gatewayed("g", Clock())
    bound = gateway.job("b", most=5)
    gateway.lanes.hear([room(ReplicaLoad(most_running=64))], {})
    await gateway.settle()
    assert (bound.held, gateway.lanes.places) == (5, None)
    await gateway.close()


async def test_a_setting_caps_what_the_engines_have_room_for() -> None:
    gateway = Gatewayed("g", Clock())
    job = gateway.job("a", most=7)
    gateway.lanes.hear([room(load())], {})
    await gateway.settle()
    assert (job.held, gateway.lanes.places) == (7, SLOTS + RESERVE)
    await gateway.close()


async def test_jobs_of_a_gateway_have_the_same_and_the_late_one_comes_first() -> None:
    gateway = Gatewayed("g", Clock())
    gateway.lanes.hear([room(load())], {})
    first = gateway.job("a")
    await gateway.settle()
    assert first.held == SLOTS + RESERVE
    second, third = gateway.job("b"), gateway.job("c")
    await gateway.settle()
    # None is without any.
    assert (second.held, third.held) == (1, 1)
    await gateway.end_rows(60)
    assert [lane.held for lane in (first, second, third)] == pytest.approx([20 / 3] * 3, abs=1)
    third.urgent_at = 100.0
    await gateway.end_rows(60)
    assert [lane.held for lane in (first, second, third)] == [1, 1, 18]
    third.urgent_at = None
    await gateway.end_rows(60)
    assert [lane.held for lane in (first, second, third)] == pytest.approx([20 / 3] * 3, abs=1)
    await gateway.close()


async def test_a_place_that_is_waited_for_no_longer_is_not_lost() -> None:
    lanes = BulkLanes()
    lane = lanes.lane("a", most=1)
    await lane.acquire()
    waiting = [asyncio.create_task(lane.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    # Given to the second before the first knows.
    lane.release()
    waiting[1].cancel()
    await asyncio.wait(waiting, timeout=PATIENCE_S)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert (lane.held, lanes.demands) == (1, {"a": BulkDemand(1, more=False)})
    lane.release()
    assert (lane.held, lanes.demands) == (0, {})


async def test_work_that_is_done_waits_for_no_place() -> None:
    lanes = BulkLanes()
    lane = lanes.lane("a", most=1)
    await lane.acquire()
    lane.take()
    assert lane.held == 2
    later = asyncio.create_task(lane.acquire())
    await asyncio.sleep(0)
    lane.release()
    await asyncio.sleep(0)
    assert not later.done()
    lane.release()
    await asyncio.wait_for(later, PATIENCE_S)


class Engine:
    """An engine of a few lines: in steps with online requests, bulk rows are parked but for ``beside`` of them."""

    def __init__(self, beside: int = 0) -> None:
        self.beside = beside
        self.running = self.waiting = self.served = 0
        self.online = 0
        self.bulk_tokens = self.online_tokens = 0

    def step(self, sent: int, ends: int) -> int:
        """Take what was sent and step; how many rows ended."""
        self.waiting += sent
        free = SLOTS - self.online - self.running
        if self.online:
            free = min(free, self.beside - self.running)
        admitted = min(self.waiting, max(0, free))
        self.running, self.waiting = self.running + admitted, self.waiting - admitted
        self.served = min(self.running, self.beside) if self.online else self.running
        self.bulk_tokens += self.served
        self.online_tokens += self.online
        ended = min(self.served, ends)
        self.running -= ended
        return ended

    @property
    def report(self) -> ReplicaLoad:
        return load(
            self.running,
            self.waiting,
            self.running - self.served,
            self.online,
            bulk_tokens=self.bulk_tokens,
            online_tokens=self.online_tokens,
        )


class Loop:
    """Gateways with jobs, and an engine that reports twice a second; a step is 50 ms."""

    def __init__(self, engine: Engine, gateways: int = 1) -> None:
        self.clock = Clock()
        self.engine = engine
        self.gateways = [Gatewayed(f"g{number}", self.clock) for number in range(gateways)]
        self.rooms = [EngineRoom() for _ in self.gateways]
        self.steps = 0
        # The steps' rows that were computed, and that waited.
        self.used: list[int] = []
        self.queued: list[int] = []

    async def run(self, seconds: float, ends: int = 1) -> None:
        """Let it run; so many rows end a step if there are."""
        self.used, self.queued = [], []
        for _ in range(round(seconds / 0.05)):
            if self.steps % 10 == 0:
                demands = {gateway.name: gateway.lanes.demands for gateway in self.gateways}
                for gateway, room in zip(self.gateways, self.rooms, strict=True):
                    room.note(self.engine.report, gateway.lanes.held, self.clock.now_s)
                    gateway.lanes.hear([room], demands)
            before = [len(gateway.sent) for gateway in self.gateways]
            for gateway in self.gateways:
                await gateway.settle()
            sent = sum(len(gateway.sent) - n for gateway, n in zip(self.gateways, before, strict=True))
            ended = self.engine.step(sent, ends)
            self.used.append(self.engine.served)
            self.queued.append(self.engine.waiting)
            for _ in range(ended):
                # Rows end in the order in which they came, whosever they are.
                max(self.gateways, key=lambda gateway: len(gateway.sent)).sent.popleft().release()
            for gateway in self.gateways:
                await gateway.settle()
            # What was sent meanwhile arrives with the next step.
            self.engine.waiting += sum(len(g.sent) for g in self.gateways) - self.engine.running - self.engine.waiting
            self.steps += 1
            self.clock.now_s += 0.05

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.close()


async def test_an_engine_never_runs_dry_and_little_waits() -> None:
    loop = Loop(Engine())
    loop.gateways[0].job("a")
    await loop.run(3)
    for ends in (1, 3, 16):
        await loop.run(5, ends)
        assert min(loop.used) == SLOTS
        assert max(loop.queued) <= RESERVE + ends
    await loop.close()


async def test_while_online_requests_need_the_engine_no_rows_pile_up_and_after_that_it_is_full_at_once() -> None:
    loop = Loop(Engine(beside=2))
    lane = loop.gateways[0].job("a")
    await loop.run(5)
    loop.engine.online = 6
    await loop.run(30, ends=1)
    assert loop.used[-1] == 2
    assert lane.held == 2 + RESERVE
    assert not lane.starved
    loop.engine.online = 0
    await loop.run(1)
    assert loop.used[-1] == SLOTS
    await loop.close()


async def test_a_job_that_gets_nothing_says_so_and_goes_on_by_itself() -> None:
    loop = Loop(Engine())
    lane = loop.gateways[0].job("a")
    await loop.run(5)
    assert not lane.starved
    loop.engine.online = 6
    await loop.run(STARVED_AFTER_S + 1)
    assert lane.starved
    assert lane.alive_s == pytest.approx(loop.clock.now_s, abs=0.6)
    loop.engine.online = 0
    await loop.run(1)
    assert not lane.starved
    await loop.close()


async def test_gateways_that_see_the_same_reports_share_and_take_what_the_other_leaves() -> None:
    loop = Loop(Engine(), gateways=2)
    one = loop.gateways[0].job("a")
    await loop.run(3)
    assert one.held == SLOTS + RESERVE
    other = loop.gateways[1].job("b")
    await loop.run(10)
    assert (one.held, other.held) == ((SLOTS + RESERVE) // 2, (SLOTS + RESERVE) // 2)
    assert min(loop.used) == SLOTS
    await loop.gateways[1].close()
    await loop.run(10)
    assert one.held >= SLOTS + RESERVE - other.held
    assert min(loop.used) == SLOTS
    await loop.close()
