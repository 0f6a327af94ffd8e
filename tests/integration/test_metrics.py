"""What Prometheus reads of a real cluster with two ingress processes and two replicas: it adds up, and no panel is
empty."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hycluster.auth.limits import KINDS
from hycluster.client import Client
from hycluster.core import ExpertLoad, Sampling
from hycluster.directory.autoscaling import Scaling
from hycluster.limits.limiter import refused
from hycluster.monitoring.panels import DASHBOARDS
from hycluster.observe.experts import ExpertMetrics
from hycluster.observe.limits import LimitMetrics
from hycluster.observe.scaling import ScalingMetrics
from tests.integration.conftest import eventually
from tests.integration.featured import TINY, Featured
from tests.prometheus import Prometheus, prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BY_HTTP, BY_GRPC, TOKENS = 24, 8, 6
# This cluster has no experts and no pool that follows its load: of these panels the queries are asked of stand-ins.
# tests/integration/test_expert_load.py and test_load_curve.py have the real ones.
STOOD_IN = ("experts", "scaling")


def read(featured: Featured, **asked: str) -> Counter[tuple[str, frozenset[tuple[str, str]]]]:
    """All series of one scrape, by a connection of its own."""
    answer = httpx.get(f"{featured.served.http}/metrics", params=asked, timeout=30).raise_for_status()
    families = text_string_to_metric_families(answer.text)
    found = [(one.name, frozenset(one.labels.items()), one.value) for family in families for one in family.samples]
    assert len({(name, labels) for name, labels, _ in found}) == len(found)
    return Counter({(name, labels): value for name, labels, value in found})


def total(series: Any, name: str, **labels: str) -> float:
    return float(sum(value for (one, own), value in series.items() if one == name and labels.items() <= own))


def values_of(series: Any, name: str, label: str) -> set[str]:
    return {dict(own)[label] for (one, own), value in series.items() if one == name and value}


def ask(featured: Featured, number: int = BY_HTTP, at_a_time: int = 1) -> None:
    """What the load generator counts; each request by a connection of its own, so at any ingress process.

    Args:
        at_a_time: of HTTP's. Of requests that come one after the other, the replica whose cache is calmer may get all.
    """

    def complete(index: int) -> None:
        body = {"model": TINY, "prompt": f"{index} and so on", "max_tokens": TOKENS, "ignore_eos": True}
        httpx.post(f"{featured.served.http}/v1/completions", json=body, timeout=60).raise_for_status()

    with ThreadPoolExecutor(at_a_time) as callers:
        list(callers.map(complete, range(number)))
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    for index in range(BY_GRPC):
        with Client(featured.served.grpc) as client:
            client.generate(model=TINY, prompt=f"{index} by gRPC", sampling=sampling)


def test_sums_over_labels_are_what_was_asked(featured: Featured) -> None:
    before = read(featured)
    ask(featured, at_a_time=8)
    # One that is refused, and one to no route.
    for path, status in (("/v1/completions", 400), ("/wp-login.php", 404)):
        got = httpx.post(f"{featured.served.http}{path}", json={"model": TINY, "prompt": "x", "n": 0}, timeout=30)
        assert got.status_code == status
    after = read(featured)
    grown = Counter({series: value - before[series] for series, value in after.items()})
    asked = BY_HTTP + BY_GRPC
    assert total(grown, "vllm:request_success_total", model=TINY) == asked
    assert total(grown, "vllm:generation_tokens_total", model=TINY) == asked * TOKENS
    assert total(grown, "vllm:prompt_tokens_total", model=TINY) > asked
    assert total(grown, "vllm:e2e_request_latency_seconds_count", model=TINY, model_name=TINY, engine="0") == asked
    assert total(grown, "hycluster_requests_routed_total", model=TINY) == asked
    completions = {"model": TINY, "method": "POST", "handler": "/v1/completions"}
    assert total(grown, "http_requests_total", **completions, status="200") == BY_HTTP
    assert total(grown, "http_requests_total", **completions, status="400") == 1
    assert total(grown, "http_request_duration_seconds_count", **completions) == BY_HTTP + 1
    assert total(grown, "http_requests_total", handler="none", status="404") == 1
    assert total(grown, "grpc_server_handled_total", model=TINY, grpc_method="Generate", grpc_code="OK") == BY_GRPC
    # Nobody is asked here who he is.
    nobody = {"tenant": "", "project": ""}
    assert total(grown, "hycluster_project_requests_total", **nobody, outcome="finished") == asked
    assert total(grown, "hycluster_project_requests_total", **nobody, outcome="refused") == 1
    assert total(grown, "hycluster_project_tokens_total", **nobody, kind="output") == asked * TOKENS
    assert total(grown, "hycluster_project_tokens_total", kind="input") + total(
        grown, "hycluster_project_tokens_total", kind="cached"
    ) == total(grown, "vllm:prompt_tokens_total", model=TINY)
    # Both processes and both replicas have had some, and each scrape reads all of them.
    assert len(values_of(grown, "http_requests_total", "ingress")) == 2
    assert len(values_of(grown, "vllm:request_success_total", "replica")) == 2
    for _ in range(6):
        assert len(values_of(read(featured), "process_start_time_seconds", "ingress")) == 2

    # What concerns the pool is shown by one of them, and nothing runs any more.
    def settled() -> bool:
        now = read(featured)
        shown = [own for name, own in now if name == "vllm:num_requests_running" and ("model", TINY) in own]
        return len(shown) == 2 and total(now, "vllm:num_requests_running", model=TINY) == 0

    eventually(settled, 60, "both replicas say once that they have nothing to do")
    assert total(read(featured), "hycluster_replicas_ready", model=TINY) == 2


def test_one_replica_is_what_an_endpoint_picker_reads(featured: Featured) -> None:
    """The model server protocol of the Gateway API's inference extension (docs/monitoring.md)."""
    whole = read(featured)
    for replica in values_of(whole, "vllm:cache_config_info", "replica") & values_of(
        read(featured), "vllm:request_success_total", "replica"
    ):
        series = read(featured, replica=replica)
        assert all(dict(own)["replica"] == replica for _, own in series)
        found = {name: dict(own) for name, own in series}
        if found["vllm:cache_config_info"].get("model") != TINY:
            continue
        assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= found.keys()
        assert int(found["vllm:cache_config_info"]["block_size"]) > 0
        assert int(found["vllm:cache_config_info"]["num_gpu_blocks"]) > 0
        adapters = found["vllm:lora_requests_info"]
        assert int(adapters["max_lora"]) > 0
        assert {"running_lora_adapters", "waiting_lora_adapters"} <= adapters.keys()
        break
    else:
        raise AssertionError("there is no replica of it")
    assert httpx.get(f"{featured.served.http}/metrics", params={"replica": "x"}, timeout=30).status_code == 404


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where series of experts, scaling and limits are, as the collectors make them of pools and keys that are none."""
    registry, experts, scaling = CollectorRegistry(), ExpertMetrics(), ScalingMetrics()
    for collector in (experts, scaling, LimitMetrics()):
        registry.register(collector)
    pool: Any = SimpleNamespace(shows_pool=True, requests_waiting=1, expert_loads={})
    gateway: Any = SimpleNamespace(engine_core=pool, cold_start=SimpleNamespace(scaling=None))

    class Weak(SimpleNamespace):
        """A namespace that can be referred to weakly, as all objects of classes can."""

    pool, gateway = Weak(**vars(pool)), Weak(**vars(gateway))
    gateway.engine_core = pool
    experts.watch("stood-in", pool)
    scaling.watch("stood-in", gateway)

    class Page(http.server.BaseHTTPRequestHandler):
        count = 0

        def do_GET(self) -> None:
            Page.count += 1
            pool.expert_loads = {"r": ExpertLoad((Page.count, 2 * Page.count), Page.count, 1.3, 1.1)}
            monkeypatch.setitem(refused, (KINDS[0], "key"), Page.count)
            gateway.cold_start.scaling = Scaling(2, 1, 3.0, 40.5, {"wake": Page.count})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def empty_panels(running: Prometheus) -> list[tuple[str, str, str]]:
    found = []
    for board in DASHBOARDS:
        model = "stood-in" if board.name in STOOD_IN else TINY
        for panel in board.panels:
            for query in panel.queries:
                promql = query.promql
                for name, value in {"$__rate_interval": "1m", "$model": model, "$tenant": ".*"}.items():
                    promql = promql.replace(name, value)
                # No replica has been lost here: the stall of migrated requests has no quantile, but its series.
                counted = re.sub(r"histogram_quantile\([\d.]+, (.*)\)$", r"\1", promql)
                if not running.query(promql) and not (board.name == "pool" and running.query(counted)):
                    found.append((board.name, panel.title, promql))
    return found


def test_no_panel_is_empty(featured: Featured, stood_in: str, tmp_path: Path) -> None:
    targets = [urlsplit(featured.served.http).netloc, stood_in]
    with prometheus(targets, tmp_path) as running:
        eventually(running.healthy, 60, "both targets have been read")
        ask(featured, 6)
        # A rate takes two scrapes of each series that differ, and some of them have just begun.
        deadline = time.monotonic() + 120
        while (empty := empty_panels(running)) and time.monotonic() < deadline:
            ask(featured, 1)
            time.sleep(1)
        assert empty == []
        # Nothing is wrong here, so no alert but those that look at what lasts.
        assert running.firing(model=TINY) | running.firing(model="") <= {
            "HyclusterFirstTokenLateFast", "HyclusterFirstTokenLateSlow", "HyclusterFirstTokenLateSlowly",
        }  # fmt: skip
        # The stand-in's requests wait for a replica that there is not.
        assert running.firing(model="stood-in") == {"HyclusterNothingWakes"}
        # And each rule can be evaluated.
        rules = httpx.get(f"{running.url}/api/v1/rules", timeout=60).json()["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
