"""Which numbers a model is held in, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hycluster.errors import SettingsError, shown

# Bits a number, scales included: int4 with a 16-bit scale for 128 weights, mxfp4 with an 8-bit one for 32, nvfp4 with
# an 8-bit one for 16. Scales of 8-bit weights are one for many thousands of them.
BITS: dict[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "fp8": 8,
    "int8": 8,
    "int4": 4.125,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
}
FULL = ("float32", "bfloat16", "float16")
KV_TYPES = (*FULL, "fp8")
_INTEGERS = {8: "int8", 4: "int4"}
_COMPRESSED = {"float8": "fp8", "int8": "int8", "int4": "int4", "float4": "nvfp4"}


@dataclass(frozen=True, slots=True)
class Precision:
    """Data types of one way to hold a model.

    Attributes:
        weights: of the projections.
        kept: of embedding, head, router and norms, which quantization leaves alone, and of activations.
        kv: of the KV cache.
        experts_only: only routed experts have ``weights``, all else ``kept``.
        block: rows and columns of the weights that share a scale, where they are in blocks.
        stored: the checkpoint itself says ``weights``; else vLLM makes it so at load, or another checkpoint is meant.
    """

    weights: str = "bfloat16"
    kept: str = "bfloat16"
    kv: str = "bfloat16"
    experts_only: bool = False
    block: tuple[int, int] | None = None
    stored: bool = True

    @property
    def quantized(self) -> bool:
        return self.weights not in FULL


def size(count: float, dtype: str) -> float:
    """Bytes of so many numbers.

    Raises:
        SettingsError: a data type that is not known.
    """
    return count * BITS[known("dtype", dtype, tuple(BITS))] / 8


def known(name: str, dtype: str, allowed: tuple[str, ...]) -> str:
    if dtype not in allowed:
        raise SettingsError(f"{name}: {shown(dtype)} is not allowed; must be one of {', '.join(allowed)}")
    return dtype


def precision_of(config: Mapping[str, Any], weights: str | None = None, kv: str | None = None) -> Precision:
    """The data types of a checkpoint with this ``config.json``.

    Args:
        weights: in place of what the configuration says.
        kv: in place of the data type of the activations.

    Raises:
        SettingsError: a data type or a quantization that is not known.
    """
    if weights is not None:
        known("weights", weights, tuple(BITS))
    said = config.get("torch_dtype") or config.get("dtype")
    # vLLM serves checkpoints in float32 with 16 bits unless it is told otherwise.
    kept = str(weights) if weights in FULL else "float16" if said == "float16" else "bfloat16"
    stored, block = _stored(config.get("quantization_config"), kept)
    if stored is None and weights is None:
        raise SettingsError(
            f"quantization_config: {shown(config.get('quantization_config'))} is not known; say what the weights are in"
            " with --weights"
        )
    chosen = str(weights or stored)
    return Precision(
        weights=chosen,
        kept=kept,
        kv=kept if kv in (None, "auto") else known("kv", str(kv), ("auto", *KV_TYPES)),
        experts_only=chosen == "mxfp4",
        block=block if chosen == stored else None,
        stored=chosen == stored,
    )


def _stored(quantization: Any, kept: str) -> tuple[str | None, tuple[int, int] | None]:
    """Weights' data type by a ``quantization_config``, None if that is not known, and its blocks."""
    if not quantization:
        return kept, None
    if not isinstance(quantization, Mapping):
        return None, None
    method = quantization.get("quant_method")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        return "fp8", (int(block[0]), int(block[1])) if block else None
    if method == "mxfp4":
        return "mxfp4", None
    if method in ("gptq", "awq"):
        return _INTEGERS.get(quantization.get("bits", 0)), None
    if method == "modelopt" and quantization.get("quant_algo") in ("FP8", "NVFP4"):
        return str(quantization["quant_algo"]).lower(), None
    return _compressed(quantization) if method == "compressed-tensors" else None, None


def _compressed(quantization: Mapping[str, Any]) -> str | None:
    """The one data type that all groups of a compressed-tensors configuration have."""
    found = set()
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        bits, kind = weights.get("num_bits"), weights.get("type")
        found.add(_COMPRESSED.get(f"{kind}{bits}"))
    return found.pop() if len(found) == 1 else None
