"""``hycluster plan`` as a process."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from hycluster.errors import SettingsError
from hycluster.planning.deployment import what_to_plan
from hycluster.planning.layouts import Pinned
from hycluster.settings.read import load_settings
from tests.command import HEAVY, run, run_anew
from tests.planning.configs import PATHS

LARGE = str(PATHS["hunyuan-large"])


def test_tells_as_json_and_writes_settings_without_anything_heavy(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    done, imported = run_anew("plan", LARGE, "--gpu", "h20", "--json", "--write", str(path), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layout"]["gpus"] == 16
    (model,) = load_settings(path).models
    assert (model.name, model.source) == ("hunyuan-large", "/models/hunyuan_large")
    assert "`hycluster plan " in path.read_text()
    assert not HEAVY & imported


def test_tells_as_a_table(tmp_path: Path) -> None:
    done, _ = run("plan", LARGE, "--gpu", "H20", "--context-tokens", "8192", "--concurrency", "64", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "smallest: 16 H20, 2 nodes" in done.stdout


def test_a_folder_gives_the_name_and_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "My_Model"
    folder.mkdir()
    (folder / "config.json").write_text(PATHS["llama-3.1-8b"].read_text())
    path = tmp_path / "x.yaml"
    done, _ = run("plan", str(folder), "--gpu", "L4", "--context-tokens", "1024", "--write", str(path), home=tmp_path)
    assert done.returncode == 0, done.stderr
    (model,) = load_settings(path).models
    assert (model.name, model.source) == ("my-model", str(folder))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((LARGE, "--gpu", "H2O"), "--gpu: 'H2O' is not known (did you mean H20?); must be one of A10, "),
        (("nowhere.json", "--gpu", "H20"), "nowhere.json': no such file or folder; must be a model's config.json"),
        (("./nowhere", "--gpu", "H20"), "./nowhere': no such file or folder; must be a model's config.json"),
        (("nowhere.yaml",), "nowhere.yaml: no such file"),
        ((LARGE, "--gpu", "H20", "--model", "x"), "--model: is for a deployment (.yaml)"),
        ((LARGE,), "--gpu: must be given"),
        (("deployments/local.yaml",), "hardware.accelerator: is not set, it runs on CPU"),
        (("deployments/hunyuan-large-bf16-16xh20.yaml",), "source: '/models/Hunyuan-A52B-Instruct': no such file"),
        ((LARGE, "--gpu", "H20", "--weights", "int3"), "weights: 'int3' is not allowed; must be one of float32, "),
        ((LARGE, "--gpu", "H20", "--context-tokens", "999999"), "--context-tokens: 999999 is not allowed"),
        ((LARGE, "--gpu", "H20", "--tensor", "7"), "layout: no such layout on nodes of 8 GPUs"),
        ((LARGE, "--gpu", "H20", "--data", "32", "--expert"), "layout: expert over 32 ranks: 16 experts leave 16"),
        ((LARGE, "--gpu", "H20", "--name", "x"), "--name: is for the file that --write makes"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done, imported = run("plan", *arguments, home=tmp_path)
    assert done.returncode == 2, done.stdout
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert says in done.stderr
    # Only Ray knows what a node on this machine will be.
    assert not HEAVY & imported or arguments == (LARGE,)


def deployment(folder: Path, count: int = 1) -> Path:
    """A deployment whose models are in a folder, on two L4."""
    (folder / "config.json").write_text(PATHS["llama-3.1-8b"].read_text())
    model = {
        "source": str(folder),
        "engine": {"max_model_len": 16384, "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.95},
        "parallel": {"tensor": 2},
        "hardware": {"accelerator": "L4", "gpus_per_node": 2},
    }
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump({"models": [model | {"name": f"m{number}"} for number in range(count)]}))
    return path


def test_a_deployment_says_the_gpu_the_layout_and_the_context(tmp_path: Path) -> None:
    done, imported = run("plan", str(deployment(tmp_path)), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["gpu"]["name"], told["layout"]["parallel"]["tensor"], told["precision"]["kv"]) == ("L4", 2, "fp8")
    assert (told["demand"]["context_tokens"], told["demand"]["utilization"]) == (16384, 0.95)
    assert told["demand"]["per_node"] == 2
    assert not HEAVY & imported


def test_of_a_deployment_on_another_gpu_the_layout_is_open(tmp_path: Path) -> None:
    asked = what_to_plan(str(deployment(tmp_path)), None, "H200")
    assert (asked.gpu.name, asked.pinned) == ("H200", Pinned())


def test_of_several_models_one_is_named(tmp_path: Path) -> None:
    path = str(deployment(tmp_path, count=2))
    with pytest.raises(SettingsError, match=r"--model: .* has several; must be one of \['m0', 'm1'\]"):
        what_to_plan(path, None, None)
    assert what_to_plan(path, "m1", None).name == "m1"


def test_a_hub_id_is_its_own_name_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache is a folder; tests/planning/test_source.py asks a hub."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(PATHS["qwen3-8b"].read_text())
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = what_to_plan("org/model", None, "L40S")
    assert (asked.name, asked.source, asked.config["model_type"]) == ("org/model", "org/model", "qwen3")
