"""Four processes at five times the limit: what is let in, whatever dies."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from typing import Any

import pytest

from hycluster.auth.limits import Limit
from hycluster.errors import HyclusterError
from hycluster.limits.holding import GOES_AHEAD
from hycluster.limits.reservation import RequestTokens
from tests.limits.virtual import ME, Process, World, run

PROCESSES, OVERLOAD = 4, 5


class Load:
    """Attributes: admitted: seconds since the beginning at which requests were let in, with their tokens."""

    def __init__(
        self, world: World, per_minute: float, tokens: int = 10, asks_for: int | None = None, seed: int = 7
    ) -> None:
        self.world = world
        self.admitted: list[tuple[float, int]] = []
        self.processes = [world.process() for _ in range(PROCESSES)]
        self.dead: set[Process] = set()
        self._per_s = per_minute / 60
        self._tokens, self._asks_for = tokens, asks_for or tokens
        self._began_s = world.now_s()
        self._random = random.Random(seed)

    async def go_on(self, seconds: float) -> None:
        ends_s = self.world.now_s() + seconds
        async with asyncio.TaskGroup() as group:
            while True:
                wait_s = self._random.expovariate(self._per_s)
                if self.world.now_s() + wait_s >= ends_s:
                    break
                await asyncio.sleep(wait_s)
                process = self._random.choice(self.processes)
                if process not in self.dead:
                    group.create_task(self._request(process))
        await asyncio.sleep(max(0.0, ends_s - self.world.now_s()))

    async def _request(self, process: Process) -> None:
        limiter = process.limiter
        try:
            reservation = await limiter.reserve(limiter.concerning(ME, "m"), RequestTokens(1, 0, self._asks_for - 1))
        except HyclusterError:
            return
        if process in self.dead:
            return
        self.admitted.append((self.world.now_s() - self._began_s, self._tokens))
        await asyncio.sleep(1.0)
        reservation.add(RequestTokens(1, 0, self._tokens - 1))
        reservation.end()

    def share(self, limit: int, until_s: float, *, tokens: bool = False) -> float:
        """What was let in, by what the limit lets in in so long a time."""
        used = sum(each if tokens else 1 for at_s, each in self.admitted if at_s < until_s)
        return used / (limit * until_s / 60)

    def most_in_a_minute(self) -> int:
        times = sorted(at_s for at_s, _ in self.admitted)
        return max(bisect_left(times, at_s + 60) - first for first, at_s in enumerate(times))


# Of a small limit one request is much, and by chance none comes for a second.
LIMITS = [*((60, seed) for seed in range(6)), (300, 7), (1200, 7)]


@pytest.mark.parametrize(("limit", "seed"), LIMITS)
def test_requests_by_the_minute(limit: int, seed: int) -> None:
    async def main() -> None:
        world = World(Limit("acme", requests_per_minute=limit))
        load = Load(world, OVERLOAD * limit, seed=seed)
        await load.go_on(180)
        for until_s in (60, 90, 120, 150, 180):
            # The last one may be on its way.
            assert 1.0 - (limit <= 60) / limit <= load.share(limit, until_s) <= 1.02, until_s
        assert load.share(limit, 180) >= 1.0
        assert load.most_in_a_minute() <= 1.02 * limit
        # However many requests there are.
        assert world.calls <= 180 * PROCESSES * 20

    run(main())


@pytest.mark.parametrize(("limit", "seed"), LIMITS)
def test_one_is_killed_and_the_directory_restarts(limit: int, seed: int) -> None:
    async def main() -> None:
        world = World(Limit("acme", requests_per_minute=limit))
        load = Load(world, OVERLOAD * limit, seed=seed)
        await load.go_on(75)
        load.dead.add(load.processes[0])
        load.processes[0].kill()
        await load.go_on(10)
        world.book = None
        await load.go_on(5)
        world.start_directory()
        await load.go_on(90)
        assert 1.0 <= load.share(limit, 180) <= 1.02
        assert load.most_in_a_minute() <= 1.02 * limit

    run(main())


@pytest.mark.parametrize("after_s", [0.3, 20.0])
def test_a_restart_while_the_first_burst_is_out(after_s: float) -> None:
    limit = 300

    async def main() -> None:
        world = World(Limit("acme", requests_per_minute=limit))
        load = Load(world, 60 * limit)
        await load.go_on(after_s)
        world.book = None
        await load.go_on(3)
        world.start_directory()
        await load.go_on(60 - 3 - after_s)
        assert 0.99 <= load.share(limit, 60) <= 1.02

    run(main())


def test_tokens_by_the_minute_of_which_less_is_used_than_reserved() -> None:
    limit = 30_000

    async def main() -> None:
        world = World(Limit("acme", tokens_per_minute=limit))
        load = Load(world, OVERLOAD * limit / 100, tokens=100, asks_for=160)
        await load.go_on(180)
        # What is on its way back is not there for others; all the time it is the same.
        assert 0.995 <= load.share(limit, 180, tokens=True) <= 1.02

    run(main())


def test_far_from_its_limits_hardly_a_request_waits_for_a_lease() -> None:
    many = 10**12
    waits_s: list[float] = []

    async def caller(process: Process) -> None:
        limiter = process.limiter
        for _ in range(200):
            began_s = asyncio.get_running_loop().time()
            reservation = await limiter.reserve(limiter.concerning(ME, "m"), RequestTokens(16, 0, 64))
            waits_s.append(asyncio.get_running_loop().time() - began_s)
            await asyncio.sleep(random.Random(len(waits_s)).uniform(0.05, 0.15))
            reservation.add(RequestTokens(16, 0, 64))
            reservation.end()

    async def main() -> None:
        world = World(
            Limit("acme", requests_per_minute=many, tokens_per_minute=many, tokens_per_day=many,
                  concurrent_requests=many, budget_per_month=many)
        )  # fmt: skip
        process = world.process()
        await asyncio.gather(*(caller(process) for _ in range(8)))

    run(main())
    # The first ones wait for what nobody knows yet.
    assert sum(wait_s > 0 for wait_s in waits_s) <= 8


@pytest.mark.parametrize("kind", ["requests_per_minute", "concurrent_requests", "tokens_per_day"])
def test_after_a_pause_none_waits_for_a_lease_and_the_book_hears_of_all(kind: str) -> None:
    limit = 100_000
    most = int(limit * GOES_AHEAD)
    values: dict[str, Any] = {kind: limit}

    async def main() -> None:
        world = World(Limit("acme", **values))
        limiter = world.process().limiter

        async def burst(requests: int) -> float:
            began_s = world.now_s()
            for _ in range(requests):
                await limiter.reserve(limiter.concerning(ME, "m"), RequestTokens(1, 0, 0))
            return world.now_s() - began_s

        assert await burst(1) > 0, "nothing is known yet"
        await asyncio.sleep(10)
        assert await burst(most) == 0
        assert await burst(1) > 0, "the book is to hear of that first"
        await asyncio.sleep(2)
        name, expected = (Limit("acme").subject, kind), most + 2
        assert world.book is not None
        period = next((holding.period for holding in limiter._holdings.values()), "")
        bucket = world.book._buckets.get(name)
        assert (bucket.usage.used(world.now_s(), period) if bucket else world.book.used()[name]) == expected

    run(main())


def test_near_the_limit_none_goes_ahead() -> None:
    limit = 3000

    async def main() -> None:
        world = World(Limit("acme", requests_per_minute=limit))
        limiters = [world.process().limiter for _ in range(PROCESSES)]

        async def burst(requests: int) -> float:
            began_s = world.now_s()
            for _ in range(requests):
                await limiters[0].reserve(limiters[0].concerning(ME, "m"), RequestTokens(1))
            return world.now_s() - began_s

        await burst(limit * 6 // 10)
        await asyncio.sleep(5)
        assert await burst(1) > 0

    run(main())


def test_all_are_killed_in_the_first_burst_after_a_pause() -> None:
    """What they let in ahead of their leases is told by nobody."""
    limit = 3000

    async def main() -> None:
        world = World(Limit("acme", requests_per_minute=limit))
        load = Load(world, OVERLOAD * limit)
        for process in load.processes:
            await load._request(process)
        # Leases have gone back.
        await asyncio.sleep(2.3)
        async with asyncio.TaskGroup() as group:
            for process in load.processes:
                for _ in range(int(limit * GOES_AHEAD / PROCESSES)):
                    group.create_task(load._request(process))
            await asyncio.sleep(0)
            for process in load.processes:
                process.kill()
        load.processes = [world.process() for _ in range(PROCESSES)]
        await load.go_on(50)
        assert len(load.admitted) > limit
        assert load.most_in_a_minute() <= 1.02 * limit

    run(main())
