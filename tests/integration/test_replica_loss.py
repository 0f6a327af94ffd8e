"""What a caller sees when a replica dies, on a real cluster with simulated engines.

Carrying a stream over is a later stop; here: nobody hangs, the others are not touched, the pool is whole again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import psutil
import pytest

from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.errors import Unavailable
from tests.integration.conftest import SIMULATED, Served, eventually, replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def replica_processes(served: Served) -> list[psutil.Process]:
    """Processes that hold a simulated replica."""
    below = psutil.Process(served.process.pid).children(recursive=True)
    return [p for p in below if p.name() != "" and f"replica-{SIMULATED}" in " ".join(p.cmdline())]


async def test_streams_of_a_lost_replica_end_with_unavailable(served: Served) -> None:
    eventually(lambda: len(replicas(SIMULATED)) == 2, 30, "both replicas are there")
    victim, _ = replica_processes(served)
    outcomes: list[str] = []
    async with AsyncClient(served.grpc) as caller:

        async def ask() -> None:
            try:
                async for _ in caller.stream(
                    model=SIMULATED, prompt="x", sampling=Sampling(max_tokens=150, ignore_eos=True)
                ):
                    pass
                outcomes.append("whole")
            except Unavailable:
                outcomes.append("unavailable")

        streams = [asyncio.create_task(ask()) for _ in range(20)]
        await asyncio.sleep(1)
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        while outcomes.count("unavailable") < 10 and time.monotonic() - killed < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        told_after_s = time.monotonic() - killed
        await asyncio.gather(*streams)
        assert sorted(outcomes) == ["unavailable"] * 10 + ["whole"] * 10
        assert told_after_s < 1
        # The other replica serves on, and nobody is sent to the dead one.
        for _ in range(10):
            await caller.generate(model=SIMULATED, prompt="y", sampling=Sampling(max_tokens=3))
    assert (await asyncio.to_thread(httpx.get, f"{served.http}/health")).status_code == 200
    eventually(lambda: len(replica_processes(served)) == 2, 60, "Serve has started a successor")
    eventually(lambda: len([r for r in replicas(SIMULATED) if r.accepting]) >= 2, 60, "the successor reports")
