"""The shared memory of an engine's ranks on CPU ends with the processes that use it.

What: the segments of a group of ranks lose their names in ``/dev/shm`` once all ranks have opened them.
Why: the ranks exchange tensors through them, and what has a name there outlives a process that is killed. A name is
only needed until the other ranks have opened the segment.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_memory.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
import glob
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")
PATCHED = "hycluster_drops_names"


def patch_segments() -> None:
    """Have ranks drop the names, in this process; more than once does nothing. Does nothing on other platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    started: Any = _CPUSHMDistributed._init_cpu_shm
    if hasattr(started, PATCHED):
        return

    @functools.wraps(started)
    def init_cpu_shm(communicator: _CPUSHMDistributed) -> Any:
        handle = started(communicator)
        _drop_names(communicator)
        return handle

    setattr(init_cpu_shm, PATCHED, True)
    _CPUSHMDistributed._init_cpu_shm = init_cpu_shm  # type: ignore[method-assign, assignment]


def _drop_names(communicator: Any) -> None:
    """Behind the barrier at the end of the set-up, all ranks have opened each other's segments."""
    for segment in FOLDER.glob(f"{glob.escape(communicator.group_name)}_*"):
        # Each rank does it; the first one counts.
        segment.unlink(missing_ok=True)
