from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.sources import set_on_self

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_segments_of_a_group_lose_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.engine.patches import cpu_memory

    monkeypatch.setattr(cpu_memory, "FOLDER", tmp_path)
    group, other = "ident-tp:0-[0-1]-cpushm", "ident-tp:0-[2-3]-cpushm"
    for name in (f"{group}_0", f"{group}_1", f"{other}_0"):
        (tmp_path / name).touch()
    cpu_memory._drop_names(SimpleNamespace(group_name=group))
    assert [path.name for path in tmp_path.iterdir()] == [f"{other}_0"]


def test_patching_again_changes_nothing() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    from hycluster.engine.patches.cpu_memory import patch_segments

    patch_segments()
    before = _CPUSHMDistributed._init_cpu_shm
    patch_segments()
    assert _CPUSHMDistributed._init_cpu_shm is before


KILLED = """
import os, signal, sys, torch
torch.ops.load_library(sys.argv[1])
handle = torch.ops._C.init_shm_manager(sys.argv[2], 1, 0, 1)
torch.ops._C.join_shm_manager(handle, sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("vllm_imported")
def test_a_rank_that_is_killed_still_leaves_its_segment() -> None:
    """When this fails, vLLM's segments have no names that stay."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_shm_manager"):
        pytest.skip("vLLM's build for this CPU has no shared memory between ranks")
    mapped = Path("/proc/self/maps").read_text().split()
    library = next(path for path in mapped if "/vllm/_C" in path)
    name = f"hycluster-test-{os.getpid()}-cpushm"
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, library, name], capture_output=True, check=False, timeout=120
    )
    left = list(Path("/dev/shm").glob(f"{name}_*"))
    for segment in left:
        segment.unlink()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(left) == 1


def test_names_go_behind_the_last_barrier() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    assert "group_name" in set_on_self(_CPUSHMDistributed.__init__)
    started = inspect.getsource(_CPUSHMDistributed._init_cpu_shm)
    assert started.index("join_shm_manager") < started.rindex("barrier")
