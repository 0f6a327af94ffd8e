from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

ONES = "{LoRARequest('a', 1, '/one'), LoRARequest('a', 2, '/two'), LoRARequest('a', 2, '/two')}"


def of_a_step(patched: bool) -> int:
    """How many adapters vLLM takes these for, in a process of its own."""
    patch = "from hycluster.engine.patches.adapter_identity import patch_adapter_identity as p; p(); p();"
    code = f"from vllm.lora.request import LoRARequest; {patch if patched else ''} print(len({ONES}))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(ran.stdout.split()[-1])


def test_vllm_still_takes_adapters_of_one_name_for_one() -> None:
    assert of_a_step(patched=False) == 1


def test_patched_they_are_two() -> None:
    assert of_a_step(patched=True) == 2
