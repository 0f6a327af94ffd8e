from __future__ import annotations

import inspect

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_vllm_still_takes_triton_for_experts_beside_adapters() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    chosen = inspect.getsource(unquantized.select_unquantized_moe_backend)
    assert "if moe_config.is_lora_enabled:" in chosen
    assert chosen.index("is_lora_enabled") < chosen.index("_get_priority_backends")


def test_the_manager_asks_for_the_modules_and_gets_no_experts() -> None:
    from vllm.lora import model_manager
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    from hycluster.engine.patches.cpu_lora_experts import modules_but_experts, patch_lora_experts

    assert "get_supported_lora_modules(" in inspect.getsource(model_manager.LoRAModelManager)
    patch_lora_experts()
    made = FusedMoEConfig.__post_init__
    patch_lora_experts()
    assert FusedMoEConfig.__post_init__ is made
    assert vars(model_manager)["get_supported_lora_modules"] is modules_but_experts
