"""What online callers feel of a batch job on their engine, and what the job gets: alone, and beside one another.

    python -m bench.colocation --seconds 60              # about 8 minutes on two idle cores
    python -m bench.colocation --seconds 60 --arrivals bursts

One replica of the embedded model on one core. Online requests of 60 tokens in and 24 out arrive in an open loop, by
chance or in bursts (the gaps of `../shared/traces`, scaled, if that is there); the job is `hycluster batch run
--engine shared` over more rows than it can do. Sides, which take turns with the same arrivals:

- `alone`: no job.
- `colocation`: the settings' default.
- `priority`: vLLM's own scheduler with its priority policy (`colocation.enabled: false`), the job as it is by default.
- `bound`: the same, and the job keeps so few rows in flight that a step of them is about `max_step_s`: what a gateway
  can do without the engine.

The job's rate alone is measured just before, on the same service. What idle time would have allowed (`allowed`) is that
rate times the share of the time in which no online request was under way (`idle`), and `share` is what the job got of
it. The last lines say which bounds hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import datetime as dt
import gzip
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench import batch
from bench.gateway import running
from hycluster.batch.progress.status import Watcher
from hycluster.client import AsyncClient
from hycluster.errors import SettingsError
from hycluster.settings.model import Colocation
from hycluster.storage import locate

# By side: which service, and how many rows its job keeps in flight.
SIDES = {"colocation": ("colocation", 256), "priority": ("vllm", 256), "bound": ("vllm", 16)}
PROMPT_TOKENS, TOKENS, VOCABULARY = 60, 24, 40_000
ROWS, SHARD_ROWS, ROW_TOKENS = 4_000, 2, 32
# A job's first rows are all prompts; and then some.
SETTLE_S = 10.0
TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure_llm_2023_conv.csv.gz"


@dataclass(frozen=True)
class Service:
    """A running service: its gRPC address and its Ray cluster's."""

    grpc: str
    ray: str
    work: Path


@dataclass
class Window:
    """What was measured in one window. Seconds, but for ``bulk_tokens_s``.

    Attributes:
        tpot: by request, the mean gap between its tokens; ``itl`` are all gaps.
        idle: share of the time in which no online request was under way.
        bulk_tokens_s, bulk_alone_tokens_s: the job's output tokens; in the window, and before it.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    idle: float = 1.0
    bulk_tokens_s: float = 0.0
    bulk_alone_tokens_s: float = 0.0

    @property
    def bulk_allowed_tokens_s(self) -> float:
        return self.bulk_alone_tokens_s * self.idle


@contextlib.contextmanager
def starting(name: str, enabled: bool, work: Path) -> Iterator[Path]:
    """A service that starts; yields its log."""
    settings = batch.settings()
    settings["models"][0]["colocation"] = {"enabled": enabled}
    folder = work / name
    folder.mkdir()
    (folder / "settings.yaml").write_text(json.dumps(settings))
    log = folder / "serve.log"
    with running([sys.executable, "-m", "hycluster", "serve", str(folder / "settings.yaml")], {}, log):
        yield log


def started(log: Path) -> Service:
    while (ready := re.search(r"^ready .*$", log.read_text(), re.MULTILINE)) is None:
        time.sleep(0.2)
    said = re.match(r"ready \S+ grpc (?P<grpc>\S+) ray (?P<ray>\S+)", ready[0])
    if said is None:
        raise SystemExit(f"{log}: no addresses in {ready[0]!r}")
    return Service(said["grpc"], said["ray"], log.parent)


@contextlib.contextmanager
def job(service: Service, name: str, rows_in_flight: int) -> Iterator[Watcher]:
    """A job that does not end by itself, once it runs evenly."""
    path, output = service.work / f"{name}.yaml", service.work / f"out-{name}"
    path.write_text(json.dumps({**batch.job(ROW_TOKENS), "shard_rows": SHARD_ROWS, "rows_in_flight": rows_in_flight}))
    command = [sys.executable, "-m", "hycluster", "batch", "run", str(path), "--engine", "shared"]
    command += ["--input", str(service.work.parent / "corpus"), "--output", str(output), "--address", service.ray]
    with running(command, {}, service.work / f"{name}.log"):
        watcher = Watcher(locate(str(output), "OUTPUT"))
        while not done_tokens(watcher):
            time.sleep(0.5)
        time.sleep(SETTLE_S)
        yield watcher


def done_tokens(watcher: Watcher) -> int:
    """Output tokens that are committed."""
    with contextlib.suppress(SettingsError):
        return watcher.look().done.completion_tokens
    return 0


def gaps(arrivals: str, rate: float, seed: int) -> Iterator[float]:
    """Seconds between arrivals, on average ``1 / rate``."""
    rng = random.Random(seed)
    if arrivals == "poisson":
        while True:
            yield rng.expovariate(rate)
    if not TRACE.exists():
        # As bursty as chat: a standard deviation of three means.
        while True:
            yield rng.gammavariate(1 / 9, 9 / rate)
    with gzip.open(TRACE, "rt") as lines:
        times = [dt.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in csv.DictReader(lines)]
    found = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    scale = 1 / rate / statistics.mean(found)
    start = rng.randrange(len(found))
    yield from (gap * scale for gap in itertools.islice(itertools.cycle(found), start, None))


async def ask(client: AsyncClient, window: Window, prompt: list[int]) -> tuple[float, float]:
    """One request; when it began and when it was over."""
    begun = time.monotonic()
    times = [
        time.monotonic()
        async for _ in client.stream(batch.MODEL, token_ids=prompt, max_tokens=TOKENS, ignore_eos=True, temperature=0)
    ]
    window.ttft.append(times[0] - begun)
    window.tpot.append((times[-1] - times[0]) / (TOKENS - 1))
    window.itl += [after - before for before, after in itertools.pairwise(times)]
    return begun, times[-1]


async def online(service: Service, seconds: float, pauses: Iterator[float]) -> Window:
    """Online requests for so long; waits for the last one. Prompts are of one length and all different."""
    window, rng = Window(), random.Random()
    async with AsyncClient(service.grpc) as client:
        warm = Window()
        for _ in range(2):
            await ask(client, warm, rng.choices(range(1000, VOCABULARY), k=PROMPT_TOKENS))
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            asked = []
            while (left := begun + seconds - time.monotonic()) > 0:
                await asyncio.sleep(min(left, next(pauses)))
                prompt = rng.choices(range(1000, VOCABULARY), k=PROMPT_TOKENS)
                asked.append(group.create_task(ask(client, window, prompt)))
        spans = sorted(task.result() for task in asked)
        window.idle = 1 - covered(spans) / (time.monotonic() - begun)
    return window


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals."""
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def beside(service: Service, name: str, rows_in_flight: int, seconds: float, pauses: Iterator[float]) -> Window:
    with job(service, name, rows_in_flight) as watcher:
        before, begun = done_tokens(watcher), time.monotonic()
        time.sleep(seconds / 2)
        at_start, started_at = done_tokens(watcher), time.monotonic()
        window = asyncio.run(online(service, seconds, pauses))
        window.bulk_alone_tokens_s = (at_start - before) / (started_at - begun)
        window.bulk_tokens_s = (done_tokens(watcher) - at_start) / (time.monotonic() - started_at)
    return window


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


COLUMNS = ("TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "bulk tok/s", "alone", "idle", "allowed", "share")


def cells(windows: list[Window]) -> list[float]:
    """Medians over the rounds; times in ms."""
    rows = [
        [
            *(1e3 * percentile(window.ttft, share) for share in (0.5, 0.99)),
            *(1e3 * percentile(window.tpot, share) for share in (0.5, 0.99)),
            1e3 * percentile(window.itl, 0.99),
            window.bulk_tokens_s,
            window.bulk_alone_tokens_s,
            window.idle,
            window.bulk_allowed_tokens_s,
            window.bulk_tokens_s / window.bulk_allowed_tokens_s if window.bulk_allowed_tokens_s else float("nan"),
        ]
        for window in windows
    ]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def verdict(alone: list[float], ours: list[float]) -> None:
    """Bounds on what colocation may cost, by ``max_step_s``, and whether they hold."""
    step_ms = 1e3 * Colocation().max_step_s
    for name, value, bound in (
        ("TTFT p50 <= alone + max_step_s", ours[0], alone[0] + step_ms),
        ("TTFT p99 <= alone + 2 x max_step_s", ours[1], alone[1] + 2 * step_ms),
        ("TPOT p99 <= 1.15 x alone", ours[3], 1.15 * alone[3]),
    ):
        print(f"{name}: {value:.0f} ms, bound {bound:.0f}: {'holds' if value <= bound else 'DOES NOT HOLD'}")
    print(f"bulk >= 0.85 of what idle time allows: {ours[9]:.2f}: {'holds' if ours[9] >= 0.85 else 'DOES NOT HOLD'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of a window with online requests")
    parser.add_argument("--rate", type=float, default=0.5, help="online requests a second")
    parser.add_argument("--arrivals", choices=("poisson", "bursts"), default="poisson")
    parser.add_argument("--sides", default=",".join(SIDES), help="of colocation, priority, bound")
    args = parser.parse_args()
    sides = args.sides.split(",")
    found: dict[str, list[Window]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        (work / "corpus").mkdir()
        pq.write_table(pa.table({"text": batch.prompts(ROWS)}), work / "corpus" / "part.parquet")
        names = dict.fromkeys(SIDES[side][0] for side in sides)
        logs = {name: stack.enter_context(starting(name, name == "colocation", work)) for name in names}
        services = {name: started(log) for name, log in logs.items()}
        for number in range(args.rounds):

            def pauses(number: int = number) -> Iterator[float]:
                return gaps(args.arrivals, args.rate, number)

            found.setdefault("alone", []).append(
                asyncio.run(online(services[SIDES[sides[0]][0]], args.seconds, pauses()))
            )
            for side in sides:
                name, rows = SIDES[side]
                window = beside(services[name], f"{side}-{number}", rows, args.seconds, pauses())
                found.setdefault(side, []).append(window)
                print(f"{side}: {len(window.ttft)} requests", file=sys.stderr, flush=True)
    print(f"{'ms':<12}" + "".join(f"{column:>12}" for column in COLUMNS))
    lines = {name: cells(windows) for name, windows in found.items()}
    for name, line in lines.items():
        print(f"{name:<12}" + "".join(f"{value:>12.0f}" for value in line[:5]), end="")
        print("".join(f"{value:>12.2f}" for value in line[5:]) if name != "alone" else "")
    if "colocation" in lines:
        verdict(lines["alone"], lines["colocation"])


if __name__ == "__main__":
    main()
