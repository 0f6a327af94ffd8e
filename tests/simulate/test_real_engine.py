"""The real engine, the tiny model: what virtual time is fitted to."""

from __future__ import annotations

from pathlib import Path

import pytest

from hycluster.settings.model import Model

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("vllm_imported"),
]


def test_an_engine_is_measured_and_stands_in_virtual_time(tiny_model: Path) -> None:
    """Its steps are noted, and a model of its time fits them; how well, on a machine by itself, is for the bench."""
    from hycluster.settings.model import Colocation
    from hycluster.simulate.calibrate import fitted_settings, measure
    from hycluster.simulate.machine import simulated_machine
    from hycluster.simulate.real_engine import RealEngine
    from hycluster.simulate.run import Simulation
    from hycluster.simulate.traces import TraceRequest

    engine_settings = {"max_num_seqs": 8, "max_model_len": 512, "block_size": 32}
    hardware = {"kv_cache_gib": 0.05}
    model = Model.model_validate(
        {"name": "m", "source": str(tiny_model), "engine": engine_settings, "hardware": hardware}
    )
    engine = RealEngine(model, str(tiny_model))
    try:
        fitted = measure(engine, limit_s=10)
        assert len(engine.notes.steps) > 20
        assert fitted.base_s > 0
        engine.ask("one", range(100), 5)
        engine.wait("one")
        assert len(engine.tokens["one"]) == 5
    finally:
        engine.close()
    found = fitted_settings(fitted, engine.sizes)
    assert (found.max_num_seqs, found.max_model_len, found.block_size_tokens) == (8, 512, 32)
    assert found.kv_blocks * 32 > 512
    outcome, _ = Simulation(simulated_machine(model, found, "fitted"), Colocation()).serve(
        [TraceRequest(0, 100, 5)], None
    )
    assert outcome.served[0].ttft_s == pytest.approx(
        found.step_base_s + 99 * found.prefill_token_s + found.decode_token_s + 100 * found.kv_token_s, rel=0.01
    )
