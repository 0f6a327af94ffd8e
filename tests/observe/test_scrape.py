"""One address, several processes: real ones, over the sockets that they find each other by."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from hycluster.observe import scrape
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.scrape import Neighbours, merged, of_replica, own_families, page
from tests.waiting import PATIENCE_S

PLACE = "node-8000"
# A process beside this one, which has counted 3 of its own and shows one series of the pool's.
OTHER = """
import asyncio, sys
from pathlib import Path
from prometheus_client import REGISTRY, Counter, Gauge
from hycluster.observe.catalogue import INGRESS
from hycluster.observe import scrape
from hycluster.observe.scrape import Neighbours

Counter("tests_events", "What tests count.").inc(3, {"trace_id": "abc"})
Gauge("hycluster_replicas_wanted", "Of the pool.", ["model"]).labels("m").set(2)

async def main():
    async with Neighbours(sys.argv[1], Path(sys.argv[2])).told():
        print(INGRESS, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def other(root: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OTHER, PLACE, str(root), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture
def root() -> Iterator[Path]:
    """Short: the path of a socket has about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="hyt") as folder:
        yield Path(folder) / "own"


@pytest.fixture
def others_folder(root: Path) -> Path:
    """Everybody may write there."""
    root.mkdir()
    root.chmod(0o777)
    return root


def series(text: bytes) -> dict[tuple[str, str | None], float]:
    """By name and ingress process."""
    families = text_string_to_metric_families(text.decode())
    return {(one.name, one.labels.get("ingress")): one.value for family in families for one in family.samples}


async def test_a_scrape_reads_all_processes_of_the_address(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Neighbours(PLACE, root).told(), other(root) as (process, name):
        neighbours = Neighbours(PLACE, root)
        found = series((await page(await neighbours.families()))[0])
        assert found["tests_events_total", name] == 3
        assert found["hycluster_replicas_wanted", None] == 2
        # Each process's own, under its name, and none twice.
        assert {ingress for what, ingress in found if what == "process_start_time_seconds"} == {INGRESS, name}
        assert not [what for what, _ in found if what.endswith("_created")]
        # One that is stopped holds up nobody for long, one that is killed nobody at all.
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_S):
            assert ("tests_events_total", name) not in series((await page(await neighbours.families()))[0])
        process.kill()
        await process.wait()
        monkeypatch.setattr(scrape, "NEIGHBOUR_TIMEOUT_S", 600)
        async with asyncio.timeout(PATIENCE_S):
            assert ("tests_events_total", name) not in series((await page(await neighbours.families()))[0])
        assert [path.stem for path in (root / PLACE).iterdir()] == [str(os.getpid())]
    assert list((root / PLACE).iterdir()) == []


async def test_a_folder_of_somebody_elses_is_left_alone(others_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = others_folder
    async with Neighbours(PLACE, root).told():
        assert "is not this user's alone" in caplog.text
        assert not (root / PLACE).exists()
        # Its own are there all the same.
        assert await Neighbours(PLACE, root).families()


async def test_what_two_show_is_shown_once() -> None:
    """While one ingress process takes over from another what concerns the pool."""
    one, two = (GaugeMetricFamily("hycluster_replicas_ready", "Of the pool.", labels=["model"]) for _ in range(2))
    one.add_metric(["m"], 2)
    two.add_metric(["m"], 1)
    two.add_metric(["n"], 1)
    (family,) = await merged([[one], [two]])
    assert [(sample.labels["model"], sample.value) for sample in family.samples] == [("m", 2), ("n", 1)]


def test_one_replica_alone() -> None:
    family = GaugeMetricFamily("vllm:num_requests_running", "Running.", labels=["model_name", "replica"])
    family.add_metric(["m", "a"], 1)
    family.add_metric(["m", "b"], 2)
    other_family = GaugeMetricFamily("up_to_date", "Of none.", 1)
    (found,) = of_replica([family, other_family], "b")
    assert [(sample.labels["replica"], sample.value) for sample in found.samples] == [("b", 2)]


async def test_exemplars_come_with_openmetrics_only() -> None:
    registry = CollectorRegistry()
    Counter("tests_events", "What tests count.", registry=registry).inc(1, {"trace_id": "abc"})
    families = await own_families(registry)
    text, kind = await page(families)
    assert (b"abc" in text, kind.partition(";")[0]) == (False, "text/plain")
    text, kind = await page(families, "application/openmetrics-text; version=1.0.0")
    assert (b'# {trace_id="abc"} 1.0' in text, kind.partition(";")[0]) == (True, "application/openmetrics-text")


ASKED_BY = {
    "prometheus-2": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "prometheus-3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.1",
    "underscores": "text/plain;version=1.0.0;escaping=underscores",
    "nothing": "",
}


@pytest.mark.parametrize("accept", ASKED_BY.values(), ids=ASKED_BY)
async def test_names_are_the_same_in_every_form(accept: str) -> None:
    family = GaugeMetricFamily("vllm:num_requests_running", "Running.", 1)
    text, _ = await page([family], accept)
    assert b"\nvllm:num_requests_running 1.0\n" in text


async def test_others_have_their_turn_while_a_long_page_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "TURN_S", 0)
    registry = CollectorRegistry()
    for number in range(200):
        counter = Counter(f"vllm:tests_{number}", "What tests count.", ["replica"], registry=registry)
        for replica in range(20):
            counter.labels(str(replica)).inc()
    turns = 0

    async def stream() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        streaming = tasks.create_task(stream())
        own = await own_families(registry)
        for work in (partial(own_families, registry), partial(merged, [own]), partial(page, own)):
            turns = 0
            await work()
            assert turns >= 200
        streaming.cancel()
    text, _ = await page(own, "application/openmetrics-text; version=1.0.0")
    assert (text.count(b"# EOF"), text.count(b"\nvllm:tests_")) == (1, 4000)
