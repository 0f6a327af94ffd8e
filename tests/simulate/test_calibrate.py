from __future__ import annotations

import http.server
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from hycluster.core import ColocationLoad
from hycluster.engine.step_time import StepWork
from hycluster.errors import SettingsError
from hycluster.observe.colocation import ColocationMetrics
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.calibrate import coefficients, fit_metrics, fit_run
from tests.observe.test_colocation import Pool


@pytest.fixture
def url() -> Iterator[str]:
    """Metrics as an ingress process has them, of two replicas."""
    metrics, registry = ColocationMetrics(), CollectorRegistry()
    loads = [ColocationLoad(step_time_s=(base, 0.001, 0.002, 1e-7)) for base in (0.01, 0.03)]
    by_replica = {f"r{number}": load for number, load in enumerate(loads)}
    pool = Pool(shows_pool=True, jobs={}, colocation_loads=by_replica, gone_loads={})
    metrics.watch("m", pool)
    registry.register(metrics)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


def test_what_replicas_have_learned(url: str, tiny_model: Path, vllm_imported: None) -> None:
    model = Model(name="m", source=str(tiny_model), engine={"max_num_seqs": 8, "block_size": 16})
    fitted = fit_metrics(model, url)
    assert (fitted.step_base_s, fitted.prefill_token_s, fitted.decode_token_s) == (0.02, 0.001, 0.002)
    assert (fitted.kv_token_s, fitted.max_num_seqs, fitted.max_model_len) == (1e-7, 8, 2048)
    # A GiB, two layers, keys and values of two heads of 32, in float32; one block of them is vLLM's own.
    assert fitted.kv_blocks == (1 << 30) // (2 * 2 * 2 * 32 * 4) // 16 - 1


def test_metrics_that_do_not_have_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"--metrics: .* of model 'other'"):
        fit_metrics(Model(name="other", source="x"), url)
    with pytest.raises(SettingsError, match=r"--metrics: .* can't be read"):
        fit_metrics(Model(name="m", source="x"), "http://127.0.0.1:1/metrics")


def test_a_simulated_model_has_nothing_to_measure() -> None:
    with pytest.raises(SettingsError, match="models: m: simulated: has no engine to measure"):
        fit_run(Model(name="m", source="x", simulated=Simulated()))


def test_first_and_last_steps_count_alike() -> None:
    """The schedulers' own fit would have forgotten the first ones."""
    rng = random.Random(0)
    works = [StepWork(0, rng.randint(1, 64), rng.randint(100, 30000)) for _ in range(300)]
    works += [StepWork(rng.randint(1, 2000), 1, 100) for _ in range(300)]
    steps = [(w, 0.02 + 0.001 * w.prefill_tokens + 0.002 * w.sequences + 1e-6 * w.kv_tokens) for w in works]
    assert coefficients(steps).coefficients_s == pytest.approx((0.02, 0.001, 0.002, 1e-6), rel=0.1)
