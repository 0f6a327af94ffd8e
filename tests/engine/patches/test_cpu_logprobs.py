from __future__ import annotations

import inspect
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_ranks_are_still_compiled_and_the_patch_takes_them_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    from hycluster.engine.patches.cpu_logprobs import patch_logprobs

    module: Any = sampler
    # The sampler's own may be patched already, by the engine of another test.
    compiled: Any = logprobs.batched_count_greater_than
    assert "import batched_count_greater_than" in inspect.getsource(sampler)
    monkeypatch.setattr(module, "batched_count_greater_than", compiled)
    assert compiled._torchdynamo_orig_callable
    patch_logprobs()
    assert module.batched_count_greater_than is compiled._torchdynamo_orig_callable
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
    assert module.batched_count_greater_than(values, torch.tensor([[2.0], [5.0]])).tolist() == [2, 1]
