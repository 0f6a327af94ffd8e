from __future__ import annotations

from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.planning.precision import Precision, precision_of, size
from tests.planning.configs import published


def compressed(bits: int, kind: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("said", "weights", "block"),
    [
        (None, "bfloat16", None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", (128, 128)),
        ({"quant_method": "fp8"}, "fp8", None),
        ({"quant_method": "mxfp4"}, "mxfp4", None),
        ({"quant_method": "gptq", "bits": 4}, "int4", None),
        ({"quant_method": "awq", "bits": 4}, "int4", None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", None),
        (compressed(8, "float"), "fp8", None),
        (compressed(8, "int"), "int8", None),
        (compressed(4, "int"), "int4", None),
    ],
)
def test_a_checkpoint_says_what_it_is_in(said: Any, weights: str, block: Any) -> None:
    found = precision_of({"torch_dtype": "bfloat16", "quantization_config": said})
    assert (found.weights, found.block, found.kept, found.kv, found.stored) == (
        weights,
        block,
        "bfloat16",
        "bfloat16",
        True,
    )


def test_what_is_asked_for_goes_before_what_is_stored() -> None:
    found = precision_of(published("deepseek-v3"), weights="int4", kv="fp8")
    assert found == Precision("int4", kv="fp8", stored=False)
    assert precision_of({"torch_dtype": "float32"}).weights == "bfloat16"
    assert precision_of({"dtype": "float16"}).kept == "float16"
    assert precision_of({}, weights="float32") == Precision("float32", "float32", "float32")


@pytest.mark.parametrize(
    ("said", "weights", "kv", "says"),
    [
        (None, "int3", None, r"^weights: 'int3' is not allowed; must be one of float32, bfloat16, "),
        (None, None, "int4", r"^kv: 'int4' is not allowed; must be one of auto, float32, "),
        ({"quant_method": "bitsandbytes"}, None, None, r"^quantization_config: .* is not known; .* with --weights"),
        ("fp8", None, None, r"^quantization_config: 'fp8' is not known"),
        (compressed(3, "int"), None, None, r"^quantization_config: "),
    ],
)
def test_what_is_not_known_is_refused(said: Any, weights: str | None, kv: str | None, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        precision_of({"quantization_config": said}, weights, kv)


def test_an_unknown_quantization_can_be_said_in_words() -> None:
    said = {"quantization_config": {"quant_method": "bitsandbytes"}}
    assert precision_of(said, weights="int4").weights == "int4"


def test_scales_count() -> None:
    assert size(128, "int4") == 64 + 2
    assert size(32, "mxfp4") == 16 + 1
    assert size(16, "nvfp4") == 8 + 1
    assert size(3, "bfloat16") == 6
