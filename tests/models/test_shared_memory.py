from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hycluster.models import shared_memory


@pytest.fixture(autouse=True)
def _imported(vllm_imported: None) -> None:
    shared_memory.mend()


def test_a_queue_loses_its_name_and_still_works() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    writer = MessageQueue(n_reader=1, n_local_reader=1)
    segment = shared_memory.FOLDER / writer.buffer.shared_memory.name.lstrip("/")
    assert segment.exists()
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    waiting = threading.Thread(target=reader.wait_until_ready)
    waiting.start()
    writer.wait_until_ready()
    waiting.join()
    assert not segment.exists()
    writer.enqueue({"step": 1})
    assert reader.dequeue(timeout=5) == {"step": 1}


def test_segments_of_a_group_lose_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    group, other = "ident-tp:0-[0-1]-cpushm", "ident-tp:0-[2-3]-cpushm"
    for name in (f"{group}_0", f"{group}_1", f"{other}_0"):
        (tmp_path / name).touch()
    shared_memory._drop_segments(SimpleNamespace(group_name=group))
    assert [path.name for path in tmp_path.iterdir()] == [f"{other}_0"]


def test_mending_again_changes_nothing() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    before = MessageQueue.wait_until_ready, _CPUSHMDistributed._init_cpu_shm
    shared_memory.mend()
    assert (MessageQueue.wait_until_ready, _CPUSHMDistributed._init_cpu_shm) == before


def test_a_progress_bar_makes_no_semaphore() -> None:
    script = (
        "import multiprocessing; multiprocessing.set_start_method('spawn')\n"
        "from multiprocessing import synchronize\n"
        "made = []; new = synchronize.SemLock.__init__\n"
        "synchronize.SemLock.__init__ = lambda self, *a, **k: (made.append(self), new(self, *a, **k))[1]\n"
        "from hycluster.models import shared_memory; shared_memory.mend()\n"
        "from tqdm import tqdm; list(tqdm(range(2), disable=True))\n"
        "assert not made, made\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, timeout=120)
