from __future__ import annotations

import importlib

import pytest

from hycluster.models.plugin import CPU_PATCHES, register

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported"), pytest.mark.filterwarnings("ignore")]


def test_what_is_patched_on_cpu_is_patched_once_it_is_imported() -> None:
    register()
    for module in CPU_PATCHES:
        importlib.import_module(module)
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator, _CPUSHMDistributed
    from vllm.lora import model_manager
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    from hycluster.engine.patches import cpu_experts, cpu_gatherv, cpu_lora, cpu_lora_experts, cpu_memory

    assert hasattr(CPUUnquantizedExperts.apply, cpu_experts.PATCHED)
    assert vars(CpuCommunicator)["all_gatherv"] is cpu_gatherv.all_gatherv
    assert hasattr(_CPUSHMDistributed._init_cpu_shm, cpu_memory.PATCHED)
    assert vars(model_manager)["get_supported_lora_modules"] is cpu_lora_experts.modules_but_experts
    assert current_platform.get_punica_wrapper() == f"{cpu_lora.__name__}.PunicaWrapper"
