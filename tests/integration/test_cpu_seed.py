"""A request with a seed and a prompt of several chunks, on a real engine: bare vLLM 0.32.0 on CPU dies of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hycluster.settings.model import Model
from hycluster.settings.pool import Hardware

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPT = [5 + i * 7 % 200 for i in range(300)]


def tokens(folder: Path, chunk_tokens: int) -> list[list[int]]:
    """What two requests with one seed get, side by side, from an engine that prefills so much a step."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from hycluster.engine.vllm import VllmEngine

    arguments: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": chunk_tokens, "max_num_seqs": 4}
    hardware = Hardware(kv_cache_gib=0.0625)
    model = Model(
        name="tiny", source=str(folder), engine={**arguments, "enable_prefix_caching": False}, hardware=hardware
    )
    engine: Any = VllmEngine(model, str(folder))
    got: dict[str, list[int]] = {"a": [], "b": []}
    try:
        for name in got:
            request = EngineCoreRequest(
                request_id=name,
                prompt_token_ids=PROMPT,
                mm_features=None,
                sampling_params=SamplingParams(seed=7, temperature=1, max_tokens=12, ignore_eos=True),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
            engine.add(0, MsgpackEncoder().encode(request))
        outputs, running = MsgpackDecoder(EngineCoreOutputs), set(got)
        while running:
            message = engine.next_output()
            assert message is not None, f"the engine died: {engine.error}"
            for output in outputs.decode(message[1]).outputs:
                got[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    running.remove(output.request_id)
    finally:
        engine.shutdown()
    return list(got.values())


def test_chunks_change_no_token(tiny_model: Path) -> None:
    first, second = tokens(tiny_model, 64)
    assert len(first) == 12
    assert first == second
    assert tokens(tiny_model, 1024) == [first, second]
