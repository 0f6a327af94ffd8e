"""How many rows of bulk work a gateway has in the engines, and whose: as many as these use of what online work leaves.

Replicas say with their load how many bulk rows have a slot, wait and are parked. From that comes, a replica, how many
rows it can use (:class:`EngineRoom`); from what all gateways tell the directory with their sync, which part of them is
this one's (:func:`share_of`); and which of its jobs gets the next place (:class:`BulkLanes`). Nothing here asks
anybody: it is all in what a gateway sends and hears twice a second.

Pure, but for the event loop's futures: time comes from a clock that tests replace.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from hycluster.core import BulkDemand, ReplicaLoad

# Rows that wait in an engine's queue, so that it has one at hand whenever a row ends: at least so many, or this share
# of its slots. What waits there holds no KV blocks, but can't go to another replica that has room.
RESERVE_ROWS, RESERVE_SHARE = 4, 1 / 8
# What an engine could use at best in so many seconds counts: reports are snapshots of single steps, and a burst of
# online requests must not empty the queue behind it.
USED_WITHIN_S = 5.0
# Rows in the engines where these don't say what they have room for: of a gateway, over all of its jobs.
FIXED_ROWS = 256
# Bulk work that got no token for so long while online work got some, on all replicas that have rows of it, waits.
STARVED_AFTER_S = 5.0
# A job that had a row waiting for a place so recently wants more places.
WANTED_WITHIN_S = 2.0


class EngineRoom:
    """How many rows of bulk one engine can use, by what it reports.

    Rows that it used in its last step, and free slots if it has none that are parked and few that wait: these would be
    in the slots if it had room for them. Then more are of no use, whatever its slots say.
    """

    def __init__(self) -> None:
        self._used: deque[tuple[float, int]] = deque()
        self._slots = 0
        self._last = ReplicaLoad()
        self._held = 0
        # When it last was seen to compute bulk tokens, or to have no bulk row; and all that it had computed until then,
        # for bulk and for online work.
        self._served: tuple[float, int, int] | None = None

    def note(self, load: ReplicaLoad, held: int, now_s: float) -> None:
        """Take a report.

        Args:
            held: rows that this gateway has there.
        """
        self._last, self._held = load, held
        said = load.colocation
        if said is None:
            self._used.clear()
            return
        # A few may have come since the step began.
        full = said.parked > 0 or load.waiting > self._reserve / 2
        free = 0 if full else max(0, load.most_running - load.running)
        self._used.append((now_s, max(0, said.bulk_running - said.parked) + free))
        while now_s - self._used[0][0] > USED_WITHIN_S:
            self._used.popleft()
        rows = said.bulk_running + said.bulk_waiting
        if self._served is None or said.bulk_tokens != self._served[1] or not rows:
            self._served = now_s, said.bulk_tokens, said.online_tokens

    @property
    def holds(self) -> bool:
        """This gateway had rows there when it last reported."""
        return self._held > 0

    @property
    def rows(self) -> int | None:
        """Of all gateways together, those in its queue among them; None if it does not say enough to tell."""
        if not self._used:
            return None
        return max(used for _, used in self._used) + self._reserve

    @property
    def _reserve(self) -> int:
        return max(RESERVE_ROWS, int(RESERVE_SHARE * self._last.most_running))

    def spare(self, held: int) -> int | None:
        """How many more it can use; negative if it has more than that.

        Args:
            held: rows that this gateway has there now, which it knows better than the last report.
        """
        rows, said = self.rows, self._last.colocation
        if rows is None or said is None:
            return None
        others = max(0, said.bulk_running + said.bulk_waiting - self._held)
        return rows - others - held

    def starves(self, now_s: float) -> bool:
        """Bulk rows get nothing here, for online work gets all."""
        said = self._last.colocation
        since_s, _, online_tokens = self._served or (now_s, 0, 0)
        return said is not None and now_s - since_s >= STARVED_AFTER_S and said.online_tokens > online_tokens


def share_of(gateway: str, rows: int, demands: Mapping[str, Mapping[str, BulkDemand]]) -> int:
    """A gateway's part of the places in a pool.

    Jobs that would miss their deadlines come first, in the order of these; all others get the same, or what they want
    if that is less. What nobody wants is anybody's. A job that several gateways feed counts as one.

    Args:
        demands: by gateway, what each of its jobs has and wants.
    """
    feeders = Counter(job for jobs in demands.values() for job in jobs)
    left, mine = float(rows), 0.0
    # By deadline, and within one: whose, how much of a job it is, and the most that it can use.
    classes: dict[float, list[tuple[str, float, float]]] = {}
    for owner, jobs in demands.items():
        for job, demand in jobs.items():
            wanted = math.inf if demand.more else float(demand.rows)
            classes.setdefault(demand.urgent_at or math.inf, []).append((owner, 1 / feeders[job], wanted))
    for _, parties in sorted(classes.items()):
        # Those that want least of what is theirs first: what they leave is shared by those behind them.
        parties.sort(key=lambda party: party[2] / party[1])
        weights = sum(weight for _, weight, _ in parties)
        for owner, weight, wanted in parties:
            given = min(wanted, left * weight / max(weight, weights))
            left -= given
            weights -= weight
            mine += given if owner == gateway else 0.0
    return int(mine + left + 1e-6)


class BulkLanes:
    """The places of one gateway's bulk rows, and the jobs that share them.

    A place that is free goes to the job with the earliest deadline of those that would miss theirs, else to the one
    that has the fewest. Every job has one place at least, however little there is: so it is seen to wait, and finds
    out when there is more.

    Attributes:
        starved: all replicas that have rows of these jobs compute for online requests, and none of the rows.
        alive_s: on the clock, when engines last were seen to compute for these jobs, or to have no time for them.
    """

    def __init__(self, gateway_id: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.starved = False
        self.alive_s = -math.inf
        self.clock = clock
        self._gateway_id = gateway_id
        # Those that hold a place, or want one.
        self._lanes: dict[str, BulkLane] = {}
        self._places: int | None = None
        self._giving = False

    def lane(self, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> BulkLane:
        """The places of one job.

        Args:
            job: the same at each gateway that feeds it; no two jobs' are equal.
            most: places that it may hold.
            fixed: places that it may hold where engines don't say what they have room for, unless ``most`` is set.
        """
        return BulkLane(self, job, most, fixed)

    @property
    def demands(self) -> dict[str, BulkDemand]:
        """What the other gateways have to know, by job."""
        return {job: lane.demand for job, lane in self._lanes.items()}

    @property
    def held(self) -> int:
        return sum(lane.held for lane in self._lanes.values())

    @property
    def places(self) -> int | None:
        """Rows that these jobs may have in the engines; None where engines don't say what they have room for."""
        return self._places

    def hear(
        self,
        engines: Iterable[EngineRoom],
        demands: Mapping[str, Mapping[str, BulkDemand]],
        progress_s: float = -math.inf,
    ) -> None:
        """Take the news: see to it that as many rows are in the engines as these can use.

        Args:
            engines: of the replicas that take requests.
            demands: of all gateways, this one's among them, as they last said.
            progress_s: when the engines last sent tokens of this gateway's requests.
        """
        engines = list(engines)
        rows = [engine.rows for engine in engines]
        if not rows or None in rows:
            # There is none, or one that does not say: a job must not wait for it to speak.
            self._places = None
        else:
            # Its own it knows better than the directory.
            known = {**demands, self._gateway_id: self.demands}
            self._places = share_of(self._gateway_id, sum(n for n in rows if n is not None), known)
        now_s = self.clock()
        holding = [engine for engine in engines if engine.holds]
        self.starved = bool(holding) and all(engine.starves(now_s) for engine in holding)
        self.alive_s = now_s if self.starved else max(self.alive_s, progress_s)
        self.give_soon()

    def give_soon(self) -> None:
        """Give all places that are free to those that want one: when all that are about to ask have asked.

        Many rows end with one step, and each job asks for one place after the other: the first one that were heard
        would take them all.
        """
        if len(self._lanes) < 2:
            self._give()
        elif not self._giving:
            self._giving = True
            asyncio.get_running_loop().call_soon(self._give)

    def _give(self) -> None:
        self._giving = False
        while wanting := [lane for lane in self._lanes.values() if lane.wants and self._may_hold_more(lane)]:
            min(wanting, key=lambda lane: lane.held).give()
        for lane in self._lanes.values():
            if lane.wants:
                lane.wanted_s = self.clock()

    def _may_hold_more(self, lane: BulkLane) -> bool:
        if lane.held == 0:
            return True
        places = self._places
        if places is None:
            places = max(each.most or each.fixed for each in self._lanes.values())
        if self.held >= places or lane.held >= (lane.most or math.inf):
            return False
        # One that is late asks for one place after the other, too: nobody takes them in between.
        return not any(each.goes_before(lane) for each in self._lanes.values())

    def enter(self, lane: BulkLane) -> None:
        """A job wants places. Jobs are here only while they hold or want some, so none is forgotten here."""
        self._lanes[lane.job] = lane

    def leave(self, lane: BulkLane) -> None:
        if not lane.held and not lane.wants:
            self._lanes.pop(lane.job, None)


class BulkLane:
    """The places of one job's rows in the engines of one gateway: a semaphore whose size follows these engines.

    Attributes:
        urgent_at: seconds since the epoch: the deadline that the job would miss at its pace; None if it is not late.
        held: places that it has.
        wanted_s: on the lanes' clock, when it last wanted a place that there was not.
    """

    def __init__(self, lanes: BulkLanes, job: str, most: int | None, fixed: int) -> None:
        self.job = job
        self.most = most
        self.fixed = fixed
        self.urgent_at: float | None = None
        self.held = 0
        self._lanes = lanes
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.wanted_s = -math.inf

    @property
    def wants(self) -> bool:
        return any(not place.done() for place in self._waiting)

    @property
    def demand(self) -> BulkDemand:
        more = self.wants or self._lanes.clock() - self.wanted_s <= WANTED_WITHIN_S
        return BulkDemand(self.held, more and self.held < (self.most or math.inf), self.urgent_at)

    def goes_before(self, other: BulkLane) -> bool:
        """It has an earlier deadline that it would miss, and wants more places."""
        return (self.urgent_at or math.inf) < (other.urgent_at or math.inf) and self.demand.more

    @property
    def starved(self) -> bool:
        """Its rows wait in the engines for online requests."""
        return self._lanes.starved

    @property
    def alive_s(self) -> float:
        return self._lanes.alive_s

    async def acquire(self) -> None:
        """Take a place, when there is one; first come, first served."""
        self._lanes.enter(self)
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._lanes.give_soon()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                with contextlib.suppress(ValueError):  # passed over already
                    self._waiting.remove(place)
                self._lanes.leave(self)
            else:
                # Given in the same moment.
                self.release()
            raise

    def take(self) -> None:
        """Take a place though there may be none: for work that is done, and is about to give it back."""
        self._lanes.enter(self)
        self.held += 1

    def release(self) -> None:
        """Give a place back."""
        self.held -= 1
        self._lanes.give_soon()
        self._lanes.leave(self)

    def give(self) -> None:
        """The one that has waited longest gets a place."""
        while (place := self._waiting.popleft()).done():
            # Cancelled, and does not know yet.
            continue
        self.held += 1
        place.set_result(None)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
