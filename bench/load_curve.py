"""A pool that follows its load, 0 -> 1 -> 2 -> 1 -> 0 replicas, under callers at both ingresses that retry nothing.

    python -m bench.load_curve                                  # a tiny Llama on the real engine
    python -m bench.load_curve --engine simulated --quiet-s 5 --svg curve.svg
    python -m bench.load_curve --data 2                         # a tiny Hunyuan, a replica's experts over two ranks

Each phase has so many callers, half by HTTP and half by gRPC; a caller sends its next request when its last one has
ended. A phase lasts until the pool has had the replicas that it is to come to for a while. Exits 1 if a request failed
or the pool did not get there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx

from bench import tiny_llama
from bench.curve_plot import Curve, svg
from bench.gateway import MODEL, free_port, running
from hycluster.client import AsyncClient
from hycluster.models import tiny

LOOK_EVERY_S = 0.25
GIVE_UP_S = 240.0
BATCH = 8


@dataclass(frozen=True)
class Phase:
    """So many callers, until the pool has had so many replicas, and wanted no others, for ``hold_s``."""

    callers: int
    replicas: int
    hold_s: float


@dataclass(frozen=True)
class Answer:
    """One request as its caller saw it. Times are seconds from the beginning of the run.

    Attributes:
        phase: place in the curve of the phase that it was sent in.
        error: what went wrong; None if all of its tokens came.
    """

    ingress: str
    phase: int
    asked_s: float
    first_s: float | None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.asked_s


@dataclass(frozen=True)
class Sample:
    """What ``/health`` says, and how many callers there were."""

    at_s: float
    callers: int
    ready: int
    wanted: int


@dataclass
class Run:
    """All that was seen."""

    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    phases_s: list[float] = field(default_factory=list)

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is not None]

    @property
    def counts(self) -> list[int]:
        """Replicas that took requests, one after the other."""
        return [ready for ready, _ in groupby(sample.ready for sample in self.samples)]

    def ttfts_s(self, phase: int) -> list[float]:
        return sorted(a.ttft_s for a in self.answers if a.phase == phase and a.ttft_s is not None)


class _Driver:
    def __init__(self, http: str, grpc: str, model: str, max_tokens: int) -> None:
        self._http, self._grpc, self._model, self._max_tokens = http, grpc, model, max_tokens
        self._begun = time.monotonic()
        self._level = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.run = Run()

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._begun

    async def drive(self, curve: Sequence[Phase]) -> Run:
        async with httpx.AsyncClient(timeout=GIVE_UP_S) as client, AsyncClient(self._grpc) as caller:
            ingresses = [("HTTP", lambda: self._over_http(client)), ("gRPC", lambda: self._over_grpc(caller))]
            for phase in curve:
                self._level = phase.callers
                for number in range(phase.callers):
                    if number not in self._tasks or self._tasks[number].done():
                        ingress, ask = ingresses[number % 2]
                        self._tasks[number] = asyncio.create_task(self._call(number, ingress, ask))
                await self._until(client, phase)
                self.run.phases_s.append(self._now_s)
            await asyncio.gather(*self._tasks.values())
        return self.run

    async def _until(self, client: httpx.AsyncClient, phase: Phase) -> None:
        since, deadline = None, self._now_s + GIVE_UP_S
        while self._now_s < deadline:
            pool = (await client.get(f"{self._http}/health")).json()["models"][self._model]
            ready, wanted = pool["replicas_ready"], pool["replicas_wanted"]
            self.run.samples.append(Sample(self._now_s, phase.callers, ready, wanted))
            there = ready == wanted == phase.replicas
            since = (since if since is not None else self._now_s) if there else None
            if since is not None and self._now_s - since >= phase.hold_s:
                return
            await asyncio.sleep(LOOK_EVERY_S)
        raise TimeoutError(f"no {phase.replicas} replicas under {phase.callers} callers for {GIVE_UP_S:.0f} s")

    async def _call(self, number: int, ingress: str, ask: Callable[[], Awaitable[float | None]]) -> None:
        while number < self._level:
            phase, asked_s = len(self.run.phases_s), self._now_s
            try:
                answer = Answer(ingress, phase, asked_s, await ask())
            except Exception as error:
                answer = Answer(ingress, phase, asked_s, None, repr(error))
            self.run.answers.append(answer)

    async def _over_http(self, client: httpx.AsyncClient) -> float | None:
        body = {
            "model": self._model, "prompt": "Once upon a time", "max_tokens": self._max_tokens, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first_s, last = None, ""
        async with client.stream("POST", f"{self._http}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first_s, last = first_s or self._now_s, line
        self._check((json.loads(last[6:]).get("usage") or {}).get("completion_tokens"))
        return first_s

    async def _over_grpc(self, caller: AsyncClient) -> float | None:
        first_s, usage = None, None
        async for delta in caller.stream(
            model=self._model, prompt="Once upon a time", max_tokens=self._max_tokens, ignore_eos=True
        ):
            first_s, usage = first_s or self._now_s, delta.usage
        self._check(usage.completion_tokens if usage else None)
        return first_s

    def _check(self, tokens: int | None) -> None:
        if tokens != self._max_tokens:
            raise ValueError(f"{tokens} tokens in place of {self._max_tokens}")


async def drive(http: str, grpc: str, model: str, curve: Sequence[Phase], *, max_tokens: int = 64) -> Run:
    """Put this load on a running service.

    Raises:
        TimeoutError: the pool does not come to the replicas of a phase.
    """
    return await _Driver(http, grpc, model, max_tokens).drive(curve)


def up_and_down(callers: int, hold_s: float) -> tuple[Phase, ...]:
    """Nobody, one caller, so many that one replica is not enough, one, nobody."""
    return (
        Phase(0, 0, hold_s),
        Phase(1, 1, hold_s),
        Phase(callers, 2, hold_s),
        Phase(1, 1, hold_s),
        Phase(0, 0, hold_s),
    )


def model_settings(source: Path, engine: str, quiet_s: float, data: int = 1) -> dict[str, Any]:
    """A model's settings: none to two replicas, of which each is full with ``BATCH`` sequences.

    Args:
        data: ranks of a replica, over which its experts lie.
    """
    settings: dict[str, Any] = {
        "name": MODEL,
        "source": str(source),
        "engine": {"max_model_len": 2048, "max_num_seqs": BATCH // data},
        "parallel": {"data": data, "expert": data > 1},
        "hardware": {"cpus": 0.5, "kv_cache_gib": 0.25},
        "replicas": {"min": 0, "max": 2},
        "autoscaling": {"scale_up_after_s": 2, "scale_down_after_s": quiet_s, "scale_to_zero_after_s": quiet_s},
    }
    if engine == "simulated":
        settings["simulated"] = {"step_base_s": 0.02, "max_num_seqs": BATCH, "max_model_len": 2048, "vocab_size": 256}
    return settings


def report(run: Run, curve: Sequence[Phase]) -> None:
    print(f"{'callers':>8}{'replicas':>9}{'seconds':>9}{'requests':>9}{'failed':>7}{'TTFT p50':>10}{'max ms':>9}")
    begun_s = 0.0
    for number, (phase, ended_s) in enumerate(zip(curve, run.phases_s, strict=True)):
        ttfts = run.ttfts_s(number)
        middle, most = (1000 * statistics.median(ttfts), 1000 * ttfts[-1]) if ttfts else (0.0, 0.0)
        requests = sum(answer.phase == number for answer in run.answers)
        failed = sum(answer.phase == number for answer in run.failed)
        print(
            f"{phase.callers:>8}{phase.replicas:>9}{ended_s - begun_s:>9.1f}{requests:>9}{failed:>7}"
            f"{middle:>10.0f}{most:>9.0f}"
        )
        begun_s = ended_s
    by_ingress = ", ".join(
        f"{ingress} {sum(a.ingress == ingress for a in run.answers)}" for ingress in ("HTTP", "gRPC")
    )
    print(f"replicas: {' -> '.join(map(str, run.counts))}; requests: {by_ingress}; failed: {len(run.failed)}")
    for answer in run.failed[:5]:
        print(f"failed: {answer.ingress} at {answer.asked_s:.1f} s: {answer.error}", file=sys.stderr)


def plotted(run: Run) -> str:
    """The run as an SVG."""
    samples = run.samples
    return svg(
        Curve("callers", [(s.at_s, s.callers) for s in samples]),
        Curve("replicas", [(s.at_s, s.ready) for s in samples], wanted=[(s.at_s, s.wanted) for s in samples]),
        [(a.asked_s, a.ttft_s) for a in run.answers if a.ttft_s is not None],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["real", "simulated"], default="real")
    parser.add_argument("--data", type=int, default=1, help="data-parallel ranks of a replica")
    parser.add_argument("--callers", type=int, default=10, help="at the highest")
    parser.add_argument("--quiet-s", type=float, default=20, help="until the pool shrinks, and until it sleeps")
    parser.add_argument("--hold-s", type=float, default=15, help="how long each phase lasts once it is there")
    parser.add_argument("--svg", type=Path, help="write the plot here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    curve = up_and_down(args.callers, args.hold_s)
    http, grpc = free_port(), free_port()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folder = work / "model"
        source = (
            tiny_llama.make(folder)
            if args.data == 1
            else tiny.write_checkpoint(folder, tiny.TinyShape(layers=4, topk=2))
        )
        settings = {
            "models": [model_settings(source, args.engine, args.quiet_s, args.data)],
            "batches": None,
            "http": {"port": http},
            "grpc": {"port": grpc},
            "data_plane": {"host": "127.0.0.1"},
        }
        path = work / "settings.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "hycluster", "serve", str(path)]
        with running(command, {"HYCLUSTER_HOME": str(work / "home")}, work / "serve.log") as process:
            url = f"http://127.0.0.1:{http}"
            _wait_until_ready(url, process.poll)
            run = asyncio.run(drive(url, f"127.0.0.1:{grpc}", MODEL, curve))
    report(run, curve)
    if args.svg:
        args.svg.write_text(plotted(run))
    if args.json:
        args.json.write_text(json.dumps([vars(item) for item in (*run.samples, *run.answers)]))
    sys.exit(bool(run.failed))


def _wait_until_ready(url: str, ended: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        if ended() is not None:
            raise SystemExit(f"hycluster serve ended with {ended()}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            # Nothing listens yet.
            pass
        time.sleep(0.5)
    raise SystemExit(f"hycluster serve was not ready after {GIVE_UP_S:.0f} s")


if __name__ == "__main__":
    main()
