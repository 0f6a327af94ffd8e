"""Every patch is for one version, says all that its reader needs, and has a test that says when it can go."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hycluster.engine import patches
from hycluster.engine.patches.pinned import WrongVersion, pinned_to

FOLDER = Path(patches.__file__).parent
PATCHES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "pinned"))
ROOT = FOLDER.parents[2]


@pytest.mark.parametrize("version", ["1.2.3", "1.2.3+cpu"])
def test_its_own_version_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_library", SimpleNamespace(__version__=version))
    pinned_to("some_library", "1.2.3", "some.patch")


@pytest.mark.parametrize("version", ["1.2.4", "1.2.3rc1", "1.2.30+cpu"])
def test_any_other_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_library", SimpleNamespace(__version__=version))
    refusal = (
        f"^some.patch is for some_library 1.2.3, and {re.escape(version)} is installed: install some_library 1.2.3"
    )
    with pytest.raises(WrongVersion, match=refusal):
        pinned_to("some_library", "1.2.3", "some.patch")


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_tells_what_it_is(patch: str) -> None:
    text = (FOLDER / f"{patch}.py").read_text()
    said = text.split('"""')[1]
    for part in ("What: ", "Why: ", "Upstream: ", "Version: ", "Watched by"):
        assert part in said, part
    upstream = said.partition("\nUpstream: ")[2].partition("\nVersion: ")[0]
    assert re.search(r"[\w-]+/[\w-]+#\d+", upstream) or "none filed" in upstream
    (test,) = re.findall(r"Watched by\s+``(tests/\S+)``", said)
    assert (ROOT / test).is_file()
    (version,) = re.findall(r"\nVersion: (?:vLLM|Ray) (\d+\.\d+\.\d+)", said)
    assert f'pinned_to("{"ray" if "Version: Ray" in said else "vllm"}", "{version}", __name__)' in text


def test_of_hycluster_a_patch_imports_nothing() -> None:
    texts = [(FOLDER / f"{patch}.py").read_text() for patch in PATCHES]
    imported = {
        module for text in texts for module in re.findall(r"^\s*(?:from|import) (hycluster\S*)", text, re.MULTILINE)
    }
    assert imported == {"hycluster.engine.patches.pinned"}


def test_a_patch_refuses_before_it_imports_what_it_changes() -> None:
    """With nothing but a version in the place of either library."""
    script = (
        "import importlib, sys, types\n"
        "for name in ('vllm', 'ray'):\n"
        "    library = sys.modules[name] = types.ModuleType(name)\n"
        "    library.__version__ = '99.1.0+cpu'\n"
        "for patch in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module('hycluster.engine.patches.' + patch).patch_logging()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, *PATCHES], check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    for patch, line in zip(PATCHES, said, strict=True):
        assert line.startswith(f"WrongVersion hycluster.engine.patches.{patch} is for ")
        assert "99.1.0+cpu is installed" in line


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_imported")
def test_the_plugin_of_another_vllm_ends_with_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bare `vllm serve` of that version would: patches that are not its own must not pass in silence."""
    import vllm

    from hycluster.models.plugin import register

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    for patch in PATCHES:
        monkeypatch.delitem(sys.modules, f"hycluster.engine.patches.{patch}", raising=False)
    with pytest.raises(WrongVersion, match=r"is for vllm 0\.32\.0, and 0\.33\.0 is installed.*VLLM_PLUGINS"):
        register()
