"""What there is to serve a model on: this machine as Ray will see it, or the Ray cluster that was joined.

Pinned to Ray 2.60.0: how it counts CPUs and what it calls a GPU are its own and private (docs/reaches.md).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hycluster.errors import SettingsError, one_line, shown
from hycluster.memory import usage
from hycluster.planning.gpus import GPUS, Gpu

GIB = 1 << 30
MIB = 1 << 20
_UNKNOWN = float("nan")
_ASK_S = 30


@dataclass(frozen=True, slots=True)
class Available:
    """What a service may use.

    Attributes:
        where: what it is, for people.
        cpus: of the largest node.
        free_gib: its memory that nobody uses.
        gpu: the kind of which there are most; None without a GPU.
        accelerator: Ray's name of that kind.
        gpus: how many of them there are.
        gpus_per_node: most of them on one node.
        alone: it is this machine and no other.
    """

    where: str
    cpus: int
    free_gib: float
    gpu: Gpu | None = None
    accelerator: str | None = None
    gpus: int = 0
    gpus_per_node: int = 0
    alone: bool = False

    def __str__(self) -> str:
        if self.gpu is None:
            return f"{self.where}: {self.cpus} CPUs, {self.free_gib:.1f} GiB of memory free, no GPU"
        return f"{self.where}: {self.gpus} {self.gpu.name} of {self.gpu.memory_gib:.0f} GiB"


def this_machine() -> Available:
    """What Ray will find here.

    Raises:
        SettingsError: the driver of the GPUs does not answer.
    """
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
    from ray._private.utils import get_num_cpus

    used = usage()
    bare = Available("this machine", int(get_num_cpus()), (used.total_bytes - used.used_bytes) / GIB, alone=True)
    found = [
        (NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name) or name, memory_gib)
        for name, memory_gib in nvidia_gpus()
    ]
    if not found:
        return bare
    # Ray has one name for all of a node's GPUs: the first one's.
    accelerator, _ = found[0]
    memory_gib = min(each for _, each in found)
    gpu = gpu_called(accelerator, memory_gib)
    return dataclasses.replace(bare, gpu=gpu, accelerator=accelerator, gpus=len(found), gpus_per_node=len(found))


def nvidia_gpus() -> list[tuple[str, float]]:
    """Name and GiB of each GPU that ``CUDA_VISIBLE_DEVICES`` lets this process use, by the driver's own tool.

    Raises:
        SettingsError: the tool is here and does not answer.
    """
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible in ("", "-1", "NoDevFiles"):
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    command += [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except subprocess.TimeoutExpired:
        raise SettingsError(f"hardware: nvidia-smi does not answer within {_ASK_S} s; look at the driver") from None
    if done.returncode:
        if "No devices were found" in done.stdout + done.stderr:
            return []
        raise SettingsError(f"hardware: nvidia-smi: {one_line(done.stderr or done.stdout)}; write a settings file")
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), float(memory) * MIB / GIB) for name, memory in rows]


def gpu_called(accelerator: str, memory_gib: float | None = None) -> Gpu:
    """The GPU that Ray calls so; of several with that name (A100) the one whose memory is nearest.

    Args:
        memory_gib: as the driver tells it; None where there is no driver to ask.

    Raises:
        SettingsError: neither its memory nor the GPU is known.
    """
    alike = [gpu for gpu in GPUS.values() if accelerator in (gpu.accelerator, gpu.name, gpu.name.partition("-")[0])]
    if memory_gib is None:
        if not alike:
            raise SettingsError(
                f"hardware.accelerator: {shown(accelerator)} is not one whose memory is known; write a settings file"
            )
        return min(alike, key=lambda gpu: gpu.memory_gib)
    if not alike:
        return Gpu(
            accelerator, memory_gib, _UNKNOWN, _UNKNOWN, _UNKNOWN, False, "PCIe", _UNKNOWN, _UNKNOWN, "the driver"
        )
    nearest = min(alike, key=lambda gpu: abs(gpu.memory_gib - memory_gib))
    return dataclasses.replace(nearest, memory_gib=min(nearest.memory_gib, memory_gib))


def of_nodes(nodes: Sequence[Mapping[str, float]], where: str) -> Available:
    """What a Ray cluster has.

    Args:
        nodes: resources of each node, by Ray's names.

    Raises:
        SettingsError: it has GPUs of no known kind.
    """
    largest = max(nodes, key=lambda node: node.get("CPU", 0.0))
    bare = Available(where, int(largest.get("CPU", 0)), largest.get("memory", 0.0) / GIB)
    kinds: Counter[str] = Counter()
    for node in nodes:
        for kind in _kinds(node):
            kinds[kind] += int(node.get("GPU", 0))
    if not +kinds:
        return bare
    (accelerator, count), *_ = kinds.most_common(1)
    most = max(int(node.get("GPU", 0)) for node in nodes if accelerator in _kinds(node))
    return dataclasses.replace(
        bare, gpu=gpu_called(accelerator), accelerator=accelerator, gpus=count, gpus_per_node=most
    )


def _kinds(node: Iterable[str]) -> list[str]:
    return [name.partition(":")[2] for name in node if name.startswith("accelerator_type:")]
