"""A folder of its own for each engine's temporary files, gone when the engine is, whatever it died of.

vLLM's processes meet at files and sockets in the machine's temporary folder: a file for torch's rendezvous
(``vllm_dist_*``), and named sockets of the message queues between an engine and its workers. A process that is killed
leaves them, and nobody looks after them. Here they lie in a folder that its process holds a lock on: a folder without
one is an orphan, and whoever opens the next removes it.

Pinned to vLLM 0.32.0: ``get_file_store_init_method`` asks ``tempfile`` for its folder, ``get_open_zmq_ipc_path``
``VLLM_RPC_BASE_PATH``. ``tests/integration/test_vllm_contract.py`` says so too.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hycluster.errors import EngineStartFailed

# A socket's path may have 107 characters, and vLLM adds 37.
MOST_CHARACTERS = 70


@functools.cache
def _machines() -> str:
    """The temporary folder as it was before this process changed it."""
    return tempfile.gettempdir()


def folders() -> Path:
    """Where this user's engines on this machine have their folders."""
    where = Path(_machines()) / f"hycluster-{os.getuid()}"
    return where if len(str(where)) < MOST_CHARACTERS - len("/engine-12345678") else Path("/tmp") / where.name


class Scratch:
    """The folder of an engine that is about to start in this process.

    Attributes:
        path: of the folder; vLLM, in this process and in those that it starts, puts its files there from now on.

    Raises:
        EngineStartFailed: somebody else has taken the folder's place.
    """

    def __init__(self) -> None:
        parent = folders()
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if parent.stat().st_uid != os.getuid():
            raise EngineStartFailed(f"TMPDIR: {parent} belongs to another user; an engine's files must not lie there")
        sweep()
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            from torch._inductor.runtime.cache_dir_utils import cache_dir

            # Settles on torch's usual folder for compiled kernels, which the next engine is to find.
            cache_dir()
        self.path, self._lock = _made(parent)
        os.environ["VLLM_RPC_BASE_PATH"] = str(self.path)
        tempfile.tempdir = str(self.path)

    def remove(self) -> None:
        """The engine has ended."""
        tempfile.tempdir = _machines()
        os.environ.pop("VLLM_RPC_BASE_PATH", None)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep() -> None:
    """Remove what engines have left here that were killed."""
    for folder in folders().glob("engine-*"):
        with contextlib.suppress(OSError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _made(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix="engine-", dir=parent))
        with contextlib.suppress(OSError):
            # Somebody who sweeps may have seen it before it was locked.
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold its lock; OSError if another process does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
