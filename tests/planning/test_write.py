from __future__ import annotations

from pathlib import Path

import pytest

from hycluster.errors import SettingsError
from hycluster.planning.shares import device_share
from hycluster.planning.write import settings_text, write_settings_file
from hycluster.settings.read import load_settings
from tests.planning.configs import PATHS
from tests.planning.test_plan import plan_of


@pytest.mark.parametrize("name", PATHS)
def test_settings_are_those_of_the_plan_and_load(tmp_path: Path, name: str) -> None:
    plan = plan_of(name, "H200", concurrency=3000)
    path = tmp_path / "x.yaml"
    write_settings_file(path, settings_text(plan, name, "/models/x", "hycluster plan"), overwrite=False)
    settings = load_settings(path)
    (model,) = settings.models
    assert model.parallel == plan.chosen.parallel
    assert device_share(plan.model, model.parallel, plan.precision) == plan.chosen.share
    assert model.replicas.count == plan.chosen.replicas
    assert model.engine["max_model_len"] == 8192
    assert model.engine["max_num_seqs"] * model.engines >= 3000
    assert model.hardware.accelerator == "H200"
    assert settings.admission.max_requests == 3000


def test_comments_have_the_figures() -> None:
    text = settings_text(plan_of("hunyuan-large", context=131_072), "hunyuan-large", "/models/x", "hycluster plan x")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[0] == "# hunyuan, 388.7 billion parameters, in bfloat16 on 16 H20: tensor 8, data 2, expert"
    assert "#   weights: 48.6 GiB a GPU" in comments
    assert "#   KV cache: 10 KiB a token and GPU, 80 KiB a token in all" in comments
    assert any("3.5 million tokens" in line for line in comments)
    assert any("`hycluster plan x`" in line for line in comments)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_what_differs_from_the_usual_is_written() -> None:
    text = settings_text(plan_of("hunyuan-large", weights="fp8", kv="fp8"), "m", "/models/x", "c")
    assert "kv_cache_dtype: fp8" in text
    assert "`source` must be a" in text
    assert "expert_metrics: true" in text
    assert "kv_cache_dtype" not in settings_text(plan_of("llama-3.1-8b"), "m", "/models/x", "c")


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    write_settings_file(path, "one", overwrite=False)
    with pytest.raises(SettingsError, match=r"^--write: .*x\.yaml is there already; --overwrite replaces it$"):
        write_settings_file(path, "two", overwrite=False)
    write_settings_file(path, "two", overwrite=True)
    assert path.read_text() == "two"


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--write: .*: can't be written: No such file or directory$"):
        write_settings_file(tmp_path / "none" / "x.yaml", "one", overwrite=False)


def test_a_name_that_settings_do_not_take_is_refused() -> None:
    with pytest.raises(SettingsError, match="name: 'a b'"):
        settings_text(plan_of("llama-3.1-8b"), "a b", "/models/x", "c")
