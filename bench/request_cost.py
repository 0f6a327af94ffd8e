"""What metrics and traces cost the process of an ingress: CPU time a request, in one process that takes turns.

    python -m bench.request_cost [--rounds 7] [--requests 300] [--callers 8]

The process has the whole HTTP ingress (uvicorn, vLLM's app, the gateway, its sockets) and a simulated engine, whose
part is small and the same on all sides; its callers (``bench.load``) and the collector that gets the traces are others.
It is CPU time of all of its threads that is counted, the exporter's and its last flush among them, since wall time of a
machine with other work says little. Sides take turns, every other round backwards; ratios are medians of the rounds'.

off: nothing is counted. metrics: what ``/metrics`` has, and nothing exported. ledger: that, and a line of the usage
ledger for each request. traces-1, traces-100: metrics, and so many per cent of the requests' traces are exported.
Timelines, of which ``hycluster why`` lives, are kept on all sides. What is less than some per cent, ``bench.overhead``
tells.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench import tiny_llama
from hycluster.imports import without_collector
from hycluster.ledger.account import account_book
from hycluster.ledger.books import Books
from hycluster.ledger.keeper import Keeper
from hycluster.limits.book import RECOVERS_S, LeaseBook
from hycluster.limits.limiter import Limiter, following
from hycluster.observe.export import Export
from hycluster.observe.timelines import recorder
from hycluster.settings.ingress import Http
from hycluster.settings.ledger import Ledger
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.observe import Tracing
from hycluster.settings.simulated import Simulated
from hycluster.storage import locate
from tests.auth.keyed import Keyed
from tests.simulated_pool import SimulatedPool

BASE = "off"
# By side: whether it counts, and the share of traces that it exports.
SIDES = {
    BASE: (False, None), "metrics": (True, None), "ledger": (True, None), "traces-1": (True, 0.01),
    "traces-100": (True, 1.0),
}  # fmt: skip
TOKENS = 64
# Steps as long as the tiny model's, so that as many tokens come with each message.
ENGINE = Simulated(vocab_size=256, max_model_len=2048, step_base_s=0.004, decode_token_s=0.0001)


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Where traces are sent to: ``bench.gateway``'s, in a process of its own."""
    serve = "from bench.gateway import collector; import sys; print(collector(), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", serve]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@contextlib.asynccontextmanager
async def ingress(
    source: Path, engine: Simulated = ENGINE, *, counts: bool, keys: Keyed | None = None, short: bool = True
) -> AsyncIterator[str]:
    """One that counts what comes, or nothing; and lets in who has a key, within limits that the database has. Without
    ``short`` each request goes through all layers of vLLM's app."""
    from vllm.envs import enable_envs_cache

    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http

    model = Model(name="tiny", source=str(source), simulated=engine, engine={"max_model_len": 2048})
    with SimulatedPool(engine, 1) as pool:
        async with (
            open_gateway(
                model, pool.directory(model), router=Router(), admission=Admission(), wait_s=60, metrics=counts
            ) as gateway,
            limiting(keys) as limiter,
        ):
            generator = Generator({"tiny": gateway})
            generator.limiter = limiter
            uncounted = mock.patch("hycluster.ingress.http.Counted", lambda app, _: app)
            layered = mock.patch("hycluster.ingress.http.FastPath", lambda app: app)
            with contextlib.nullcontext() if counts else uncounted, contextlib.nullcontext() if short else layered:
                served = await serve_http(
                    generator, Http(port=0, host="127.0.0.1"), guard=keys.guard if keys is not None else None
                )
            # As an ingress process does (``hycluster/door.py``).
            enable_envs_cache()
            try:
                yield f"http://127.0.0.1:{served.port}"
            finally:
                await served.stop()


@contextlib.asynccontextmanager
async def limiting(keys: Keyed | None) -> AsyncIterator[Limiter | None]:
    """By leases of a book in this process, a call away."""
    keyring = keys.guard.keyring if keys is not None else None
    if keyring is None:
        yield None
        return
    # One that began just now would first wait to hear from all.
    book = LeaseBook(time.monotonic)
    book._began_s -= RECOVERS_S

    async def lease(*asked: Any) -> Any:
        return book.lease(*asked)

    async with following(Limiter(lambda: keyring.limits, lease, keyring.store)) as limiter:
        yield limiter


@contextlib.contextmanager
def ledger(folder: Path) -> Iterator[None]:
    """As an ingress process has it; its store is a folder."""
    books = Books(locate(str(folder / "ledger"), "ledger.store").writable(), folder / "ledger-open")
    keeper = Keeper(books, Ledger(cut_every_s=5))
    keeper.start()
    account_book.write_entry = keeper.write
    try:
        yield
    finally:
        account_book.write_entry = None
        keeper.close()


async def cpu_ms(url: str, share: float | None, endpoint: str, requests: int, callers: int) -> float:
    """Of a request, of so many."""
    gc.collect()
    tracing = Tracing(endpoint=None if share is None else endpoint, sample_ratio=share)
    begun_s = time.process_time()
    export = Export(recorder, tracing, environment={})
    load = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.load", url, "tiny", "--concurrency", str(callers), "--requests", str(requests),
        "--max-tokens", str(TOKENS), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await load.communicate()
    await asyncio.to_thread(export.close)
    spent_s = time.process_time() - begun_s
    if json.loads(said)["failed"]:
        raise SystemExit(f"not all requests were answered: {said.decode()}")
    return 1000 * spent_s / requests


async def measure(rounds: int, requests: int, callers: int) -> dict[str, list[float]]:
    """By side, ms of each round."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder, collector() as endpoint:
        source = tiny_llama.make(Path(folder) / "model")
        async with ingress(source, counts=True) as counting, ingress(source, counts=False) as other:

            async def turn(side: str, number: int) -> float:
                counts, share = SIDES[side]
                with ledger(Path(folder)) if side == "ledger" else contextlib.nullcontext():
                    return await cpu_ms(counting if counts else other, share, endpoint, number, callers)

            for side in SIDES:
                await turn(side, max(callers, requests // 4))
            for number in range(rounds):
                for side in list(SIDES)[:: -1 if number % 2 else 1]:
                    found[side].append(await turn(side, requests))
                print(
                    f"round {number + 1}: " + ", ".join(f"{side} {ms[-1]:.2f}" for side, ms in found.items()),
                    flush=True,
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--callers", type=int, default=8)
    args = parser.parse_args()
    with without_collector():
        import hycluster.ingress.http  # noqa: F401
    found: dict[str, Any] = asyncio.run(measure(args.rounds, args.requests, args.callers))
    print(f"\n{'side':<12}{'CPU ms a request':>18}{'of off':>9}{'of metrics':>12}")
    for side, ms in found.items():
        ratios = [
            statistics.median(own / its for own, its in zip(ms, found[base], strict=True)) for base in (BASE, "metrics")
        ]
        print(f"{side:<12}{statistics.median(ms):>18.2f}{ratios[0]:>9.3f}{ratios[1]:>12.3f}")


if __name__ == "__main__":
    main()
