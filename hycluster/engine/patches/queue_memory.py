"""The memory of a message queue ends with the processes that use it.

What: the ring of a queue between an engine and its workers loses its name in ``/dev/shm`` once all readers have opened
it.
Why: what has a name there outlives a process that is killed. vLLM's rings (hundreds of MiB) stay when Ray kills a
replica with all that is below it, Python's resource tracker included. A name is only needed until the other processes
have opened the ring.
Upstream: none filed for the queues of an engine that is killed as a whole. vllm-project/vllm#8803 (closed) and
vllm-project/vllm#8933 (open) are about the resource tracker's warning at an orderly end; vllm-project/vllm#51579
(closed) is the same leak of the KV offloading's file.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_queue_memory.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from typing import Any

PATCHED = "hycluster_drops_name"


def patch_queues() -> None:
    """Have vLLM's queues drop the names, in this process; more than once does nothing."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    waited: Any = MessageQueue.wait_until_ready
    if hasattr(waited, PATCHED):
        return

    @functools.wraps(waited)
    def wait_until_ready(queue: MessageQueue) -> None:
        waited(queue)
        _drop_name(queue)

    setattr(wait_until_ready, PATCHED, True)
    MessageQueue.wait_until_ready = wait_until_ready  # type: ignore[method-assign]


def _drop_name(queue: Any) -> None:
    """A queue's writer has waited until all readers had opened its ring."""
    ring = getattr(queue, "buffer", None)
    if ring is not None and ring.is_creator:
        ring.shared_memory.unlink()
        # Or it would do so again at its end.
        ring.is_creator = False
