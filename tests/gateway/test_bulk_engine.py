"""A job without end on vLLM's own scheduler, in virtual time: it needs no more rows in flight than it is given."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hycluster.core import Priority, ReplicaLoad
from hycluster.gateway.bulk import BulkLane, BulkLanes, EngineRoom
from tests.engine.test_scheduler import SLOTS, Case, make_case

pytestmark = pytest.mark.usefixtures("vllm_imported")

REPORT_EVERY_S = 0.5


class Fed:
    """An engine, and a job that has as many rows there as its lane gives it.

    Attributes:
        most: rows that were there at a time, after the first seconds.
        bulk_tokens: computed since then.
    """

    def __init__(self, folder: Path, fixed: int | None) -> None:
        self.case: Case = make_case(folder)
        self.lanes = BulkLanes("g", lambda: self.case.engine.now_s)
        self.lane: BulkLane = self.lanes.lane("job", fixed)
        self.follows = fixed is None
        self.room = EngineRoom()
        self.sent = self.most = 0
        self._tokens_before = 0

    @property
    def bulk_tokens(self) -> int:
        return self.case.load.bulk_tokens - self._tokens_before

    async def run(self, seconds: float, online_every_s: float | None) -> None:
        job = asyncio.create_task(self._feed())
        engine, reported_s, online = self.case.engine, -1.0, 0
        end_s = engine.now_s + seconds
        while engine.now_s < end_s:
            if engine.now_s - reported_s >= REPORT_EVERY_S:
                reported_s = engine.now_s
                self._report()
            if online_every_s is not None and engine.now_s >= online * online_every_s:
                self.case.add(f"online-{online}", 60, 24, Priority.ONLINE)
                online += 1
            for _ in range(4 * SLOTS):
                await asyncio.sleep(0)
            ended = set(self.case.over)
            self.case.step()
            for name in self.case.over.keys() - ended:
                if name.startswith("bulk"):
                    self.lane.release()
            if engine.now_s > end_s - seconds + 10:
                self.most = max(self.most, self.lane.held)
            else:
                self._tokens_before = self.case.load.bulk_tokens
        job.cancel()

    async def _feed(self) -> None:
        while True:
            await self.lane.acquire()
            self.case.add(f"bulk-{self.sent}", 30, 40, Priority.BATCH)
            self.sent += 1

    def _report(self) -> None:
        if self.follows:
            running, waiting = self.case.engine.scheduler.get_request_counts()
            load = ReplicaLoad(running=running, waiting=waiting, most_running=SLOTS, colocation=self.case.load)
            self.room.note(load, self.lane.held, self.case.engine.now_s)
            self.lanes.hear([self.room], {})


@pytest.mark.parametrize("online_every_s", [None, 6.0, 3.0])
async def test_it_gets_as_much_done_as_with_ever_so_many_rows(tiny_model: Path, online_every_s: float | None) -> None:
    many, fed = Fed(tiny_model, 256), Fed(tiny_model, None)
    for each in (many, fed):
        await each.run(60, online_every_s)
    assert fed.most <= SLOTS + 4
    assert many.most == 256
    assert fed.bulk_tokens >= 0.97 * many.bulk_tokens
