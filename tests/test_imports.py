from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hycluster.imports import when_imported, without_collector


def test_the_collector_rests_and_is_there_again_whatever_happens() -> None:
    def fail() -> None:
        with without_collector():
            assert not gc.isenabled()
            raise ImportError("it is not there")

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_who_has_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a package that nobody has imported, the file of a module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited").mkdir()
    (tmp_path / "awaited" / "__init__.py").touch()
    file = tmp_path / "awaited" / "part.py"
    file.write_text("value = 1\n")
    finders = list(sys.meta_path)
    yield file
    sys.meta_path[:] = finders
    for name in ("awaited", "awaited.part"):
        sys.modules.pop(name, None)


def test_what_waits_for_a_module_is_done_once_it_has_been_executed(module: Path) -> None:
    seen: list[int] = []
    for _ in range(2):
        when_imported("awaited.part", lambda: seen.append(sys.modules["awaited.part"].value))
    importlib.import_module("awaited")
    assert seen == []
    importlib.import_module("awaited.part")
    assert seen == [1, 1]
    importlib.reload(sys.modules["awaited.part"])
    assert seen == [1, 1]
    when_imported("awaited.part", lambda: seen.append(2))
    assert seen == [1, 1, 2]


def test_it_waits_on_while_the_import_fails(module: Path) -> None:
    seen: list[str] = []
    module.write_text("raise ImportError('not yet')\n")
    when_imported("awaited.part", lambda: seen.append("there"))
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("awaited.part")
    assert seen == []
    module.write_text("value = 10\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited.part")
    assert seen == ["there"]


def test_a_module_that_there_is_not_stays_missing(module: Path) -> None:
    when_imported("awaited.nothing", lambda: pytest.fail("there is no such module"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("awaited.nothing")
