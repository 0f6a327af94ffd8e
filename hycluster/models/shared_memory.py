"""Shared memory that ends with the processes that use it.

The workers of one engine talk through POSIX shared memory, and what has a name in ``/dev/shm`` outlives a process that
is killed. vLLM 0.32.0 leaves the CPU workers' segments there always, and the message queues' (hundreds of MiB) when
Ray kills a replica with all that is below it, Python's resource tracker included. A name is only needed until the
other processes have opened it: here it goes as soon as they have. ``tests/integration/test_vllm_contract.py`` says
what this relies on.
"""

from __future__ import annotations

import functools
import glob
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")


def mend() -> None:
    """Have vLLM's workers drop the names, in this process; more than once does nothing."""
    from tqdm import tqdm  # type: ignore[import-untyped]
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.platforms import current_platform

    if not hasattr(tqdm, "_lock"):
        # A progress bar's own lock is a named semaphore, in case several processes draw; a worker draws alone.
        tqdm.set_lock(threading.RLock())
    MessageQueue.wait_until_ready = _once(_drop_queue, MessageQueue.wait_until_ready)  # type: ignore[method-assign]
    if current_platform.is_cpu():
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        _CPUSHMDistributed._init_cpu_shm = _once(  # type: ignore[method-assign]
            _drop_segments, _CPUSHMDistributed._init_cpu_shm
        )


def _once(drop: Callable[[Any], None], method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, followed by ``drop``."""
    if hasattr(method, "drops_names"):
        return method

    @functools.wraps(method)
    def followed(self: Any, *arguments: Any) -> Any:
        result = method(self, *arguments)
        drop(self)
        return result

    followed.drops_names = True  # type: ignore[attr-defined]
    return followed


def _drop_queue(queue: Any) -> None:
    """A queue's writer has waited until all readers had opened its ring."""
    ring = getattr(queue, "buffer", None)
    if ring is not None and ring.is_creator:
        ring.shared_memory.unlink()
        # Or it would do so again at its end.
        ring.is_creator = False


def _drop_segments(communicator: Any) -> None:
    """Behind the barrier at the end of the set-up, all ranks have opened each other's segments."""
    for segment in FOLDER.glob(f"{glob.escape(communicator.group_name)}_*"):
        # Each rank does it; the first one counts.
        segment.unlink(missing_ok=True)
