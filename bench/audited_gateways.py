"""Gateways that look into each difference between what they predicted of KV caches and what was found (`bench.audit`).

The first block that is wrong is looked for in what its replica has told since the request was sent, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from hycluster.engine.block_changes import decode_changes
from hycluster.engine.protocol import EngineInfo, Frame
from hycluster.errors import HyclusterError, Unavailable
from hycluster.gateway.pool import PoolClient
from hycluster.gateway.prefixes import Prefix, Prefixes
from hycluster.gateway.router import make_policy
from hycluster.settings.model import Model

NOT_TOLD = "not told"


@dataclass
class Told:
    """Of a request that was sent, what its replica has told since of the blocks of its prompt."""

    prefix: Prefix
    held: int
    stored: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    anew: bool = False

    def cause(self, predicted: int, found: int) -> str:
        """Of a difference, in blocks."""
        names = self.prefix.names.tolist()
        if found > predicted:
            return "stored" if self.stored.issuperset(names[predicted:found]) else NOT_TOLD
        if self.anew:
            return "reset"
        if names[found] in self.dropped:
            return "evicted"
        return "not stored" if found >= self.held and names[found] not in self.stored else NOT_TOLD


class Audited(Prefixes):
    """A gateway's, which looks into each difference."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, Told] = {}
        self.compared, self.exact, self.unsaid = 0, 0, 0
        self.causes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def hear(self, replica_id: str, info: EngineInfo, frame: Frame) -> None:
        changes = decode_changes(frame)
        stored, dropped = set(changes.stored.tolist()), set(changes.dropped.tolist())
        for told in self.waiting.values():
            if told.prefix.replica_id == replica_id:
                told.anew |= changes.whole
                told.stored |= stored
                told.dropped |= dropped
        super().hear(replica_id, info, frame)

    def send(self, prefix: Prefix, replica_id: str) -> None:
        super().send(prefix, replica_id)
        if prefix.predicted_tokens is not None:
            assert self._index is not None
            self.waiting[id(prefix)] = Told(prefix, int(prefix.held[self._index.row(replica_id)]))

    def begun(self, prefix: Prefix, found: PrefillStats | None) -> None:
        told, predicted = self.waiting.get(id(prefix)), prefix.predicted_tokens
        if told is not None and predicted is not None:
            if found is None:
                self.unsaid += 1
            else:
                self.compare(told, predicted, found.num_local_cached_tokens)
        super().begun(prefix, found)

    def let_go(self, prefix: Prefix) -> None:
        self.waiting.pop(id(prefix), None)
        super().let_go(prefix)

    def compare(self, told: Told, predicted: int, found: int) -> None:
        self.compared += 1
        if predicted == found:
            self.exact += 1
            return
        size = told.prefix.naming.tokens
        cause = told.cause(predicted // size, found // size)
        self.causes[cause] += 1
        self.tokens[cause] += abs(predicted - found)
        if cause == NOT_TOLD:
            print(f"not told: predicted {predicted}, found {found}, held {told.held} blocks", flush=True)


class Ingress:
    """One gateway, and who waits for its answers."""

    def __init__(self, number: int, model: Model) -> None:
        policy = make_policy("predicted_ttft", f"g{number}", number, session_slack_tokens=8192)
        self.audited = Audited()
        self.client = PoolClient(
            model.name,
            policy,
            f"g{number}",
            wait_s=300,
            cold_start_wait_s=300,
            prefixes=self.audited,
            on_lost=self.lost,
        )
        self._waiting: dict[str, asyncio.Queue[Any]] = {}

    async def lost(self, request_id: str, error: HyclusterError) -> None:
        raise SystemExit(f"{request_id}: {error}")

    async def read(self) -> None:
        while True:
            for output in (await self.client.get_output_async()).outputs:
                if output.request_id in self._waiting:
                    self._waiting[output.request_id].put_nowait(output)

    @contextlib.asynccontextmanager
    async def asked(self, request: EngineCoreRequest) -> AsyncIterator[asyncio.Queue[Any]]:
        answers: asyncio.Queue[Any] = asyncio.Queue()
        self._waiting[request.request_id] = answers
        try:
            await self.client.add_request_async(request)
            yield answers
        finally:
            del self._waiting[request.request_id]

    def place(self, request: EngineCoreRequest) -> str:
        """The replica that has it."""
        return self.client._failover.flights[request.request_id].replica_id

    async def do(self, method: str, *arguments: Any) -> list[Any]:
        """On every replica; again, where one is lost meanwhile.

        Whatever a replica had to tell before its answer, this gateway has heard: answers come behind it.
        """
        while True:
            try:
                return await self.client.call_all(method, *arguments)
            except Unavailable:
                await asyncio.sleep(0.05)
