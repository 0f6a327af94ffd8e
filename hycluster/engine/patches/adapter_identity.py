"""Adapters of one name and different weights, in one step.

What: what a request says of its adapter is another one where its id is another one.
Why: vLLM takes two of the same name for the same, and loads one of the adapters of a step's requests by name. So where
a name went over to other weights while requests with the old ones run, the engine ends by a KeyError in the next step
that has both.
Upstream: vllm-project/vllm#30931 (open).
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_adapter_identity.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from vllm.lora.request import LoRARequest


def _same(one: LoRARequest, other: object) -> bool:
    return isinstance(other, LoRARequest) and one.lora_int_id == other.lora_int_id


def _hash(one: LoRARequest) -> int:
    return hash(one.lora_int_id)


def patch_adapter_identity() -> None:
    """Put it into vLLM, in this process; more than once does nothing."""
    LoRARequest.__eq__ = _same  # type: ignore[method-assign]
    LoRARequest.__hash__ = _hash  # type: ignore[method-assign,assignment]
