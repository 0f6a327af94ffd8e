"""A worker's progress bars leave no semaphore behind.

What: the lock of progress bars (tqdm's) is one within the process.
Why: vLLM shows one as it loads weights. A bar's own lock is a named semaphore, in case several processes draw, and a
name in ``/dev/shm`` outlives a process that is killed. A worker draws alone.
Upstream: none filed with vLLM; tqdm offers ``set_lock`` for it.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_progress_bar.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import threading

from tqdm import tqdm  # type: ignore[import-untyped]


def patch_progress_bars() -> None:
    """Put it into this process; a lock that a bar has already stays."""
    if not hasattr(tqdm, "_lock"):
        tqdm.set_lock(threading.RLock())
