from __future__ import annotations

from typing import Any

import pytest

from tests.sources import calls_on

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def added(wrapper: type[Any]) -> Any:
    """What adapters add to three tokens: of the first slot's, of none, of the second slot's."""
    import torch
    from vllm.lora.layers import LoRAMapping

    punica = wrapper(8, 4, "cpu")
    mapping = LoRAMapping(index_mapping=(11, 0, 12), prompt_mapping=(11, 0, 12), is_prefill=True)
    punica.update_metadata(mapping, [11, 12], 3, 100)
    shrink = torch.ones(2, 1, 4, 8)
    expand = torch.stack([torch.full((1, 6, 4), float(slot + 1)) for slot in range(2)])
    result = torch.zeros(3, 6)
    punica.add_lora_linear(result, torch.ones(3, 8), (shrink,), (expand,), 1.0, (6,))
    return result[:, 0].tolist()


def test_vllm_still_gives_the_last_slots_adapter_to_requests_without_one() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    assert added(PunicaWrapperCPU) == [32.0, 64.0, 64.0]


def test_patched_they_stay_without_one() -> None:
    from hycluster.engine.patches.cpu_lora import PunicaWrapper

    assert added(PunicaWrapper) == [32.0, 0.0, 64.0]


def logits_of_a_prompt(wrapper: type[Any]) -> Any:
    """What adapters add to logits of two prompts, of three tokens and of four, in a step that samples two tokens."""
    import torch
    from vllm.lora.layers import LoRAMapping

    punica = wrapper(8, 4, "cpu")
    mapping = LoRAMapping(index_mapping=(0, 0, 0, 12, 12, 12, 12), prompt_mapping=(0, 12), is_prefill=True)
    punica.update_metadata(mapping, [11, 12], 3, 100)
    shrink = torch.ones(2, 1, 4, 8)
    expand = torch.stack([torch.full((1, 6, 4), float(slot + 1)) for slot in range(2)])
    hidden, added = torch.ones(7, 8), []
    # As vLLM's runner does: those that are sampled from, and pieces of prompts. Two rows are as many as are sampled.
    for rows in (hidden[torch.tensor([2, 6])], hidden[0:2], hidden[0:3], hidden[3:5], hidden[2:6]):
        logits = torch.zeros(len(rows), 6)
        punica.add_lora_logits(logits, rows, shrink, expand, 1.0)
        added.append(logits[:, 0].tolist())
    return added


def test_vllm_still_takes_the_sampled_tokens_adapters_for_prompts() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    with pytest.raises(RuntimeError):
        logits_of_a_prompt(PunicaWrapperCPU)


def test_patched_a_prompts_logits_are_of_its_own_adapter() -> None:
    from hycluster.engine.patches.cpu_lora import PunicaWrapper

    assert logits_of_a_prompt(PunicaWrapper) == [[0, 64], [0, 0], [0, 0, 0], [64, 64], [0, 64, 64, 64]]


def test_vllm_asks_the_platform_for_the_wrapper() -> None:
    from vllm.lora.punica_wrapper import punica_selector
    from vllm.platforms import current_platform

    from hycluster.engine.patches.cpu_lora import PunicaWrapper, patch_lora

    assert calls_on(punica_selector.get_punica_wrapper, "current_platform") == {"get_punica_wrapper"}
    patch_lora()
    patch_lora()
    assert current_platform.get_punica_wrapper() == f"{PunicaWrapper.__module__}.PunicaWrapper"
