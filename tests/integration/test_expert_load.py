"""Expert counts of a real engine: what was asked of it, and nothing else."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from hycluster.core import ExpertLoad
from hycluster.errors import SettingsError
from hycluster.models.tiny import TinyShape, write_checkpoint
from hycluster.settings.model import Model, Routing
from hycluster.settings.pool import Hardware

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHAPE = TinyShape(layers=4, experts=4)
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "hunyuan", SHAPE)


def start(folder: Path, **routing: Any) -> Any:
    from hycluster.engine.vllm import VllmEngine

    model = Model(
        name="tiny",
        source=str(folder),
        routing=Routing(**routing),
        engine={"max_model_len": 512, "enable_prefix_caching": False},
        hardware=Hardware(kv_cache_gib=0.25),
    )
    return VllmEngine(model, str(folder))


def ask(engine: Any) -> None:
    """One request, to its end."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(range(PROMPT_TOKENS)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    engine.add(0, MsgpackEncoder().encode(request))
    outputs = MsgpackDecoder(EngineCoreOutputs)
    while True:
        message = engine.next_output()
        assert message is not None
        if any(output.finish_reason is not None for output in outputs.decode(message[1]).outputs):
            return


def experts(engine: Any) -> ExpertLoad:
    """The load after a reading that is asked for now."""
    for _ in range(100):
        load: ExpertLoad | None = engine.load().experts
        if load is not None and any(load.tokens):
            return load
        time.sleep(0.1)
    raise AssertionError("the engine reports no expert load")


@pytest.mark.parametrize("recycle", [None, {"capacity_factor": 1.0}])
def test_each_token_counts_once_a_layer(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recycle: dict[str, float] | None
) -> None:
    from hycluster.engine import expert_load

    engine = start(checkpoint, expert_metrics=True, recycle=recycle)
    try:
        ask(engine)
        monkeypatch.setattr(expert_load, "READ_EVERY_S", 0.0)
        load = experts(engine)
    finally:
        engine.shutdown()
    # The last token is sampled and not fed back.
    assert sum(load.tokens) == SHAPE.layers * (PROMPT_TOKENS + OUTPUT_TOKENS - 1)
    assert load.skew >= 1
    assert load.rank_skew is None
    if recycle is None:
        assert load.moved == 0
    else:
        assert load.moved > 0
        # The prompt's tokens lie evenly; those decoded one by one lie anywhere.
        assert max(load.tokens) <= SHAPE.layers * (PROMPT_TOKENS / SHAPE.experts + OUTPUT_TOKENS - 1)


def test_a_model_without_routed_experts_is_refused(tiny_model: Path) -> None:
    before = tempfile.gettempdir()
    with pytest.raises(SettingsError, match="routing: is not for this model"):
        start(tiny_model, recycle={"capacity_factor": 1.0})
    # An engine that does not start leaves this process's temporary files where they were.
    assert tempfile.gettempdir() == before
