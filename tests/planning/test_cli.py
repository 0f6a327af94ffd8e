"""``hycluster plan`` as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hycluster.settings.read import load_settings
from tests.planning.configs import PATHS
from tests.test_cli import HEAVY, run

LARGE = str(PATHS["hunyuan-large"])


def test_tells_as_json_and_writes_settings_without_anything_heavy(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    done, imported = run("plan", LARGE, "--gpu", "h20", "--json", "--write", str(path), home=tmp_path)
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
        (("nowhere", "--gpu", "H20"), "nowhere: no such file; must be a model's config.json"),
        ((LARGE, "--gpu", "H20", "--weights", "int3"), "weights: 'int3' is not allowed; must be one of float32, "),
        ((LARGE, "--gpu", "H20", "--context-tokens", "999999"), "--context-tokens: 999999 is not allowed"),
        ((LARGE, "--gpu", "H20", "--tensor", "7"), "layout: no such layout on nodes of 8 GPUs"),
        ((LARGE, "--gpu", "H20", "--data", "32", "--expert"), "layout: expert over 32 ranks: 16 experts leave 16"),
        ((LARGE, "--gpu", "H20", "--name", "x"), "--name: is for the file that --write makes"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done, imported = run("plan", *arguments, home=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert says in done.stderr
    assert not HEAVY & imported
