"""Imported, it has vLLM's workers forked; with them no import is needed anew (``vllm_forks.py``).

On CPU vLLM asks for spawn, whatever its variable says.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

from vllm.v1.executor import multiproc_executor

# ZMQ's, by its names: it makes others in a fork. On GPUs vLLM forks beside them too.
_ZMQ = "ZMQbg/"


def _fork_context() -> multiprocessing.context.ForkContext:
    # A new thread has its name a moment later; by then it waits.
    deadline = time.monotonic() + 60
    while (names := _threads()) and not all(name.startswith(_ZMQ) for name in names):
        assert time.monotonic() < deadline, f"a fork has none of the threads {names}"
        time.sleep(0.01)
    return multiprocessing.get_context("fork")


def _threads() -> list[str]:
    """But for this one."""
    here = str(os.getpid())
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != here]
    return [task.joinpath("comm").read_text().strip() for task in tasks]


vars(multiproc_executor)["get_mp_context"] = _fork_context
