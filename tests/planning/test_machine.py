"""What there is to serve on. The driver's tool is a stand-in here, that says what it says where there are GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hycluster.errors import SettingsError
from hycluster.planning.machine import gpu_called, nvidia_gpus, of_nodes, this_machine


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi; it notes what it is asked."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\ncat {tmp_path}/said\nexit $(cat {tmp_path}/code)\n')
    tool.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_gpus_by_the_drivers_tool(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (driver / "said").write_text("NVIDIA H200, 143771\nNVIDIA H200, 143771\n")
    there = this_machine()
    assert (there.accelerator, there.gpus, there.gpus_per_node, there.alone) == ("H200", 2, 2, True)
    assert there.gpu is not None
    assert there.gpu.memory_gib == pytest.approx(140.4, abs=0.01)
    assert "--id" not in (driver / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-abc")
    nvidia_gpus()
    assert "--id=1,GPU-abc" in (driver / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia_gpus() == []


def test_a_driver_that_does_not_answer_is_named(driver: Path) -> None:
    (driver / "said").write_text("Failed to initialize NVML: Driver/library version mismatch\n")
    (driver / "code").write_text("18")
    with pytest.raises(SettingsError, match=r"hardware: nvidia-smi: Failed to initialize NVML"):
        nvidia_gpus()
    (driver / "said").write_text("No devices were found\n")
    assert nvidia_gpus() == []


def test_rays_names_are_those_that_a_cluster_will_have(driver: Path) -> None:
    """Ray 2.60.0 takes them from the driver's; a model that asks for another finds no place."""
    for said, accelerator in (
        ("NVIDIA A100-SXM4-80GB, 81920", "A100"),
        ("NVIDIA GeForce RTX 4090, 24564", "GeForce-RTX-4090"),
        ("Tesla V100-SXM2-16GB, 16384", "V100"),
        ("NVIDIA L40S, 46068", "L40S"),
    ):
        (driver / "said").write_text(said)
        assert this_machine().accelerator == accelerator


def test_of_several_gpus_of_one_name_the_memory_tells_which() -> None:
    assert gpu_called("A100", 79.3).bandwidth_gbs == gpu_called("A100-80G", 80).bandwidth_gbs
    assert gpu_called("A100", 39.4).bandwidth_gbs < gpu_called("A100", 79.3).bandwidth_gbs
    assert gpu_called("A100").memory_gib == 40
    with pytest.raises(SettingsError, match=r"hardware\.accelerator: 'GeForce-RTX-9090'"):
        gpu_called("GeForce-RTX-9090")


def test_a_cluster_offers_the_gpus_of_which_it_has_most() -> None:
    head = {"CPU": 4.0, "memory": 8.0 * 2**30}
    h200 = {"CPU": 64.0, "GPU": 8.0, "memory": 512.0 * 2**30, "accelerator_type:H200": 1.0}
    l4 = {"CPU": 8.0, "GPU": 1.0, "memory": 32.0 * 2**30, "accelerator_type:L4": 1.0}
    there = of_nodes([head, l4, h200, h200], "the cluster")
    assert (there.accelerator, there.gpus, there.gpus_per_node, there.cpus) == ("H200", 16, 8, 64)
    assert not there.alone
    bare = of_nodes([head, {"CPU": 16.0, "memory": 64.0 * 2**30}], "the cluster")
    assert (bare.gpu, bare.cpus, bare.free_gib) == (None, 16, 64)
