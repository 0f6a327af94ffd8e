"""GPUs: memory, bandwidth and arithmetic, as their vendors publish them.

TFLOPS are those of tensor (matrix) cores without sparsity; data sheets often give twice that, with it. Memory of HBM
cards is the nominal one, which drivers undercut by up to 1% (the reserve in ``shares.py`` covers it); with GDDR6 the
driver keeps 6% back for ECC, so there it is what the driver offers.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from hycluster.errors import SettingsError, shown


@dataclass(frozen=True, slots=True)
class Gpu:
    """One type of GPU.

    Attributes:
        name: what ``--gpu`` takes.
        memory_gib: of one GPU.
        bandwidth_gbs: of its memory, GB/s.
        tflops_16: dense bfloat16.
        tflops_8: dense FP8 or, where it has no FP8, INT8.
        fp8: has FP8 arithmetic; else vLLM widens FP8 weights to 16 bits in its kernels.
        interconnect: between the GPUs of a node.
        link_gbs: of one GPU to the others in its node, both directions together, GB/s.
        host_gbs: from the host's memory to one GPU, one direction, GB/s.
        source: where the vendor says so.
    """

    name: str
    memory_gib: float
    bandwidth_gbs: float
    tflops_16: float
    tflops_8: float
    fp8: bool
    interconnect: Literal["NVLink", "PCIe", "Infinity Fabric"]
    link_gbs: float
    host_gbs: float
    source: str
    per_node: int = 8

    @property
    def accelerator(self) -> str:
        """Ray's name (``ray.util.accelerators``), which goes by the driver's name of the product."""
        return _RAY_NAMES.get(self.name, self.name)

    def tflops(self, dtype: str) -> float:
        """For matrix products with weights of this data type."""
        return self.tflops_8 if dtype == "int8" or (dtype == "fp8" and self.fp8) else self.tflops_16


_RAY_NAMES = {
    "A100-40GB": "A100-40G",
    "A100-80GB": "A100-80G",
    "H100-PCIe": "H100",
    "MI300X": "AMD-Instinct-MI300X-OAM",
    "MI325X": "AMD-Instinct-MI325X-OAM",
}
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_ADA = "https://www.nvidia.com/en-us/data-center/"
_H800 = "no public data sheet of NVIDIA's; an H100's but for NVLink"
_H20 = "no public data sheet of NVIDIA's; as its partners give it"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A10", 22.5, 600, 125, 250, False, "PCIe", 64, 32, f"{_ADA}products/a10-gpu/", 4),
        Gpu("A100-40GB", 40, 1555, 312, 624, False, "NVLink", 600, 32, "https://www.nvidia.com/en-us/data-center/a100/"),
        Gpu("A100-80GB", 80, 2039, 312, 624, False, "NVLink", 600, 32, "https://www.nvidia.com/en-us/data-center/a100/"),
        Gpu("B200", 180, 8000, 2250, 4500, True, "NVLink", 1800, 64, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
        Gpu("H20", 96, 4000, 148, 296, True, "NVLink", 900, 64, _H20),
        Gpu("H100", 80, 3350, 989, 1979, True, "NVLink", 900, 64, "https://www.nvidia.com/en-us/data-center/h100/"),
        Gpu("H100-PCIe", 80, 2000, 756, 1513, True, "PCIe", 128, 64, _HOPPER),
        Gpu("H200", 141, 4800, 989, 1979, True, "NVLink", 900, 64, "https://www.nvidia.com/en-us/data-center/h200/"),
        Gpu("H800", 80, 3350, 989, 1979, True, "NVLink", 400, 64, _H800),
        Gpu("L4", 22.5, 300, 121, 242, True, "PCIe", 64, 32, f"{_ADA}l4/"),
        Gpu("L40S", 45, 864, 362, 733, True, "PCIe", 64, 32, f"{_ADA}l40s/"),
        Gpu(
            "MI300X", 192, 5300, 1307, 2615, True, "Infinity Fabric", 896, 64,
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
        ),
        Gpu(
            "MI325X", 256, 6000, 1307, 2615, True, "Infinity Fabric", 896, 64,
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html",
        ),
    )
}  # fmt: skip


def gpu(name: str) -> Gpu:
    """The GPU of that name, in any case.

    Raises:
        SettingsError: none is; lists those there are.
    """
    for known, found in GPUS.items():
        if known.lower() == name.lower():
            return found
    close = difflib.get_close_matches(name.upper(), GPUS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise SettingsError(f"--gpu: {shown(name)} is not known{hint}; must be one of {', '.join(GPUS)}")
