"""FP8 checkpoints: every weight and scale reaches its place. What is computed with them needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hycluster.models import tiny
from hycluster.models.tiny import TinyShape
from tests.vllm_forks import VllmForks

pytestmark = pytest.mark.slow

SHAPE = TinyShape(layers=3, heads=4, kv_heads=2)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "separate": {"dtype": "fp8"},
    "fused": {"dtype": "fp8", "layout": "fused"},
}


@pytest.fixture(scope="module")
def loaded(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("fp8")
    models = [tiny.write_checkpoint(folder / name, SHAPE, **stored) for name, stored in CHECKPOINTS.items()]
    script = Path(__file__).with_name("loaded_parameters.py")
    vllm_forks.run(script, str(folder), *map(str, models), timeout_s=200)
    return {name: load_file(folder / f"{name}.safetensors") for name in CHECKPOINTS}


def true_values(weight: Tensor, scale: Tensor) -> Tensor:
    """Undo the quantization of [..., rows, columns] with a scale for each part of the rows, [..., parts]."""
    if scale.ndim == weight.ndim - 2:
        scale = scale[..., None]
    parts, rows = scale.shape[-1], weight.shape[-2]
    # Query, key and value differ in size; gate and up do not.
    sizes = [rows // 2, rows // 4, rows // 4] if parts == 3 else [rows // parts] * parts
    return weight.float() * scale.repeat_interleave(torch.tensor(sizes), dim=-1)[..., None]


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_loaded_weights_times_scales_are_the_unquantized_weights(
    loaded: dict[str, dict[str, Tensor]], layout: str
) -> None:
    plain, quantized = loaded["plain"], loaded[layout]
    projections = [name for name, tensor in quantized.items() if tensor.dtype == torch.float8_e4m3fn]
    # 3 layers: qkv (or q alone), o, the routed experts' two, the shared expert's two.
    assert len(projections) == 3 * 6
    for name in projections:
        scale = quantized[f"{name}_scale"]
        found = true_values(quantized[name], scale)
        torch.testing.assert_close(found, plain[name].float(), rtol=2**-4, atol=float(scale.max()) * 2**-9)
        input_scale = quantized[f"{name.removesuffix('weight')}input_scale"]
        torch.testing.assert_close(input_scale, torch.full_like(input_scale, 64 / 448))
    rest = plain.keys() - set(projections)
    assert all(torch.equal(quantized[name], plain[name]) for name in rest)
