"""The model as built, without its memory, against the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hycluster.planning.architecture import parameters
from hycluster.planning.families import architecture
from tests.vllm_forks import VllmForks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def built(vllm_forks: VllmForks, folders: list[Path]) -> list[int]:
    said = vllm_forks.run("tests.models.meta_parameters", *map(str, folders), timeout_s=240)
    return [int(number) for number in said.splitlines()[-1].split()]


def test_the_true_configurations(tmp_path: Path, vllm_forks: VllmForks) -> None:
    folders, expected = [], []
    for name in ("hunyuan_large", "hunyuan_a13b"):
        text = (ROOT / "hycluster" / "models" / f"{name}.json").read_text()
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text(text)
        shape = architecture(json.loads(text))
        # Key norms are folded into query norms at load; vLLM rounds the vocabulary up to a multiple of 64.
        folded = len(shape.layers) * shape.head_size
        rounded_up = -shape.vocabulary % 64 * shape.hidden
        expected.append(parameters(shape).total - folded + rounded_up)
    assert built(vllm_forks, folders) == expected
