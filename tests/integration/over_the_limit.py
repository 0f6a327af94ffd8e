"""A project that asks for several times what its limit lets in, over HTTP and gRPC, whatever becomes of its answers."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from tests.integration.conftest import SIMULATED, Served

TOKENS = 2


@dataclass
class OverTheLimit:
    """Args:
        offered_per_s: requests, half of them by either way.

    Attributes:
        began_at: when the first one was sent, in seconds since the epoch. ``ended_at`` is when the last one was.
        whole: by the id of the request, prompt and output tokens of who was answered.
        broken: who had neither an answer nor was refused.
        outcomes: by way.
    """

    served: Served
    key: str
    offered_per_s: float
    began_at: float = 0.0
    ended_at: float = 0.0
    whole: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Within the block; what was asked has ended then."""
        # A connection for each: any of the ingress processes may get it.
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"authorization": f"Bearer {self.key}"}
        async with (
            httpx.AsyncClient(base_url=self.served.http, headers=headers, limits=limits, timeout=60) as http,
            asyncio.TaskGroup() as group,
        ):
            sending = group.create_task(self._send(http, group))
            try:
                yield
            finally:
                self.ended_at = time.time()
                sending.cancel()

    def check(self, limit: int, found: list[dict[str, Any]]) -> None:
        """What was let in is what the limit lets in in that time; no burst comes on top of its minutes.

        Args:
            limit: requests by the minute.
            found: the project's lines in the ledger, which has who was let in, whether his answer reached him or not;
                but of whose ingress process was killed before his answer was whole nobody knows.
        """
        admitted = [entry for entry in found if entry["ended_at"] <= self.ended_at]
        ways = Counter(f"{entry['tier']} {entry['operation']}" for entry in admitted)
        took_s = self.ended_at - self.began_at
        worth = limit * took_s / 60
        share, with_broken = len(admitted) / worth, (len(admitted) + len(self.broken)) / worth
        online = sorted(entry["ended_at"] for entry in admitted if entry["tier"] == "online")
        most = max(bisect_left(online, at + 60) - first for first, at in enumerate(online)) / limit
        print(
            f"{share:.3f} to {with_broken:.3f} of {limit} a minute in {took_s:.1f} s, in one minute online {most:.3f}"
        )
        print(dict(ways), dict(self.outcomes))
        assert took_s > 60
        assert len(ways) == 3
        assert len(self.broken) <= 0.02 * worth
        assert with_broken >= 1.0
        assert share <= 1.02
        assert most <= 1.02

    async def _send(self, http: httpx.AsyncClient, group: asyncio.TaskGroup) -> None:
        self.began_at, began_s, number = time.time(), time.monotonic(), 0
        while True:
            name = f"over-{number}"
            group.create_task(self._over_http(http, name) if number % 2 else self._by_grpc(name))
            number += 1
            await asyncio.sleep(max(0.0, began_s + number / self.offered_per_s - time.monotonic()))

    async def _over_http(self, http: httpx.AsyncClient, name: str) -> None:
        body = {"model": SIMULATED, "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True}
        try:
            answer = await http.post("/v1/completions", json=body, headers={"x-request-id": name})
        except httpx.HTTPError as error:
            self._break(name, f"HTTP {type(error).__name__}")
            return
        if answer.status_code == 200:
            usage = answer.json()["usage"]
            self.whole[name] = usage["prompt_tokens"], usage["completion_tokens"]
        elif answer.status_code != 429:
            self.broken.add(name)
        self.outcomes[f"HTTP {answer.status_code}"] += 1

    async def _by_grpc(self, name: str) -> None:
        sampling = pb.Sampling(max_tokens=TOKENS, ignore_eos=True)
        asked = pb.GenerateRequest(model=SIMULATED, prompt="x", sampling=sampling, request_id=name)
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            async with grpc.aio.insecure_channel(self.served.grpc, options=options) as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)
                answer = await stub.Generate(asked, timeout=60, metadata=(("authorization", f"Bearer {self.key}"),))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.outcomes["gRPC refused"] += 1
            else:
                self._break(name, f"gRPC {error.code().name}")
            return
        self.whole[name] = answer.usage.prompt_tokens, answer.usage.completion_tokens
        self.outcomes["gRPC answered"] += 1

    def _break(self, name: str, outcome: str) -> None:
        self.broken.add(name)
        self.outcomes[outcome] += 1
