from __future__ import annotations

import inspect
import threading
from pathlib import Path

import pytest

from tests.sources import set_on_self
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

FOLDER = Path("/dev/shm")


def ready(*, patched: bool) -> tuple[bool, object]:
    """Whether a queue has a name once its reader has opened it, and what then comes through."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from hycluster.engine.patches.queue_memory import patch_queues

    patch_queues()
    wait = MessageQueue.wait_until_ready if patched else inspect.unwrap(MessageQueue.wait_until_ready)
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    segment = FOLDER / writer.buffer.shared_memory.name.lstrip("/")
    assert segment.exists()
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    waiting = threading.Thread(target=wait, args=(reader,))
    waiting.start()
    wait(writer)
    waiting.join()
    named = segment.exists()
    writer.enqueue({"step": 1})
    return named, reader.dequeue(timeout=PATIENCE_S)


def test_a_queue_loses_its_name_and_still_works() -> None:
    assert ready(patched=True) == (False, {"step": 1})


def test_vllms_own_still_keeps_it() -> None:
    assert ready(patched=False) == (True, {"step": 1})


def test_patching_again_changes_nothing() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from hycluster.engine.patches.queue_memory import patch_queues

    patch_queues()
    before = MessageQueue.wait_until_ready
    patch_queues()
    assert MessageQueue.wait_until_ready is before


def test_a_ring_has_what_the_patch_changes() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, ShmRingBuffer

    assert {"shared_memory", "is_creator"} <= set_on_self(ShmRingBuffer.__init__)
    assert "buffer" in set_on_self(MessageQueue.__init__)
    waited = inspect.getsource(MessageQueue.wait_until_ready)
    assert "n_local_reader" in waited, "a writer waits for its readers on this machine"
