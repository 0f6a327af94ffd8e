"""``hycluster tiny-model`` as a process, but where it writes: that takes an import of torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.settings.read import load_settings
from tests.command import HEAVY, run, run_anew


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done, imported = run_anew("tiny-model", "--help", home=tmp_path)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ["PATH", "--layers", "--no-cla", "--layout", "--dtype", "--overwrite"])
    assert not HEAVY & imported


def test_writes_a_checkpoint_with_every_option(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    options = (
        "--layers 3 --hidden 96 --intermediate 32 --heads 2 --kv-heads 1 --head-size 64 --experts 4 --topk 2"
        " --shared-experts 2 --vocab 300 --context-tokens 4096 --cla-share-factor 3 --rope-alpha 50 --attention-bias"
        " --untied-embeddings --seed 9 --layout fused --format bin --dtype float32 --shard-mib 0.5"
    )
    done = CliRunner().invoke(app, ["tiny-model", str(folder), *options.split()])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["HunYuanForCausalLM"]
    wanted = {
        "model_type": "hunyuan",
        "num_hidden_layers": 3,
        "hidden_size": 96,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_head_dim": 64,
        "num_experts": 4,
        "moe_topk": 2,
        "num_shared_expert": 2,
        "vocab_size": 300,
        "max_position_embeddings": 4096,
        "use_cla": True,
        "cla_share_factor": 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in wanted} == wanted
    assert config["rope_scaling"]["alpha"] == 50
    assert (folder / "pytorch_model.bin.index.json").exists()


def test_a13b_has_no_cross_layer_attention_by_default(tmp_path: Path) -> None:
    options = ("--architecture", "hunyuan-a13b", "--layers", "1", "--topk", "2")
    done = CliRunner().invoke(app, ["tiny-model", str(tmp_path / "model"), *options])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "hunyuan_v1_moe"
    assert config["moe_topk"] == [2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--topk 9", "topk: 9 is not allowed; must be at most experts (8)"),
        ("--layout packed", "layout: 'packed' is not allowed; must be one of separate, fused"),
        ("--no-cla --cla-share-factor 4", "cla_share_factor: 4 has no effect without cross-layer attention"),
        ("--architecture hunyuan-a13b --cla", "cla: True is not allowed; must be off"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(tmp_path: Path, options: str, says: str) -> None:
    done, imported = run("tiny-model", str(tmp_path / "model"), *options.split(), home=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not HEAVY & imported
    assert not (tmp_path / "model").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done, _ = run("tiny-model", str(tmp_path), home=tmp_path)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_without_a_path_it_writes_what_the_deployment_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(Path(__file__).parents[2] / "deployments" / "hunyuan-tiny.yaml")
    monkeypatch.chdir(tmp_path)
    done, _ = run_anew("tiny-model", "--layers", "2", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / settings.models[0].source / "config.json").is_file()
