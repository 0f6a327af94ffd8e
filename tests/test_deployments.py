"""The figures in the deployments' comments are those of the arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hycluster.planning.architecture import GIB, KIB, Architecture
from hycluster.planning.families import architecture
from hycluster.planning.gpus import gpu
from hycluster.planning.precision import Precision
from hycluster.planning.shares import DeviceShare, device_share, kv_bytes_per_token
from hycluster.settings.model import Model
from hycluster.settings.read import load_settings

ROOT = Path(__file__).parent.parent
# The configurations of what deployments' names begin with.
CONFIGS = {
    "hunyuan-large": ROOT / "hycluster" / "models" / "hunyuan_large.json",
    "hunyuan-a13b": ROOT / "hycluster" / "models" / "hunyuan_a13b.json",
    "qwen3-8b": ROOT / "tests" / "planning" / "published" / "qwen3-8b.json",
}


def only_model(path: Path) -> Model:
    (model,) = load_settings(path).models
    return model


ON_GPUS = sorted((ROOT / "deployments").glob("*-[0-9]*x*.yaml"))
on_gpus = pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.name)


def shape_of(path: Path) -> Architecture:
    (config,) = [config for name, config in CONFIGS.items() if path.name.startswith(f"{name}-")]
    return architecture(json.loads(config.read_text()))


def memory_gib(path: Path) -> float:
    accelerator = only_model(path).hardware.accelerator
    assert accelerator is not None
    return gpu(accelerator).memory_gib


def test_the_names_of_deployments_are_understood() -> None:
    assert {path.name.rpartition("-")[2] for path in ON_GPUS} >= {"1xl40s.yaml", "16xh20.yaml"}


def kv_dtype(model: Model) -> str:
    return "fp8" if model.engine.get("kv_cache_dtype") == "fp8" else "bfloat16"


def share_of(path: Path) -> DeviceShare:
    model = only_model(path)
    weights = "fp8" if "fp8" in path.name else "bfloat16"
    return device_share(shape_of(path), model.parallel, Precision(weights, kv=kv_dtype(model)))


@on_gpus
def test_figures_in_comments(path: Path) -> None:
    text, share = path.read_text(), share_of(path)
    said = {
        name: float(found[1]) if (found := re.search(pattern, text)) else None
        for name, pattern in {
            "weights": r"weights: ([\d.]+) GiB a GPU",
            "kv on a GPU": r"KV cache: (\d+) KiB a token and GPU",
            "kv in all": r"(\d+) KiB a token in all",
            "room": r"room: ([\d.]+) million tokens",
        }.items()
    }
    assert said == {
        "weights": round(share.weights_bytes / GIB, 1),
        "kv on a GPU": share.kv_bytes_per_token / KIB,
        "kv in all": kv_bytes_per_token(shape_of(path), kv_dtype(only_model(path))) / KIB,
        "room": round(share.kv_tokens(memory_gib(path)) / 1e6, 1),
    }


@on_gpus
def test_as_many_devices_as_the_name_says(path: Path) -> None:
    model = only_model(path)
    assert path.name.endswith(f"-{model.parallel.devices}x{str(model.hardware.accelerator).lower()}.yaml")


@on_gpus
def test_the_longest_prompt_fits_many_times(path: Path) -> None:
    assert share_of(path).kv_tokens(memory_gib(path)) > 10 * only_model(path).engine["max_model_len"]


def test_the_tiny_one_is_walked_with_two_commands() -> None:
    path = ROOT / "deployments" / "hunyuan-tiny.yaml"
    text, model = path.read_text(), only_model(path)
    assert f"hycluster tiny-model {model.source.removeprefix('./')}\n" in text
    assert "hycluster serve deployments/hunyuan-tiny.yaml\n" in text
    assert model.hardware.accelerator is None
