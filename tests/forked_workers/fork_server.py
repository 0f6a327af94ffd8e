"""Ray's workers, forked from a process that has imported vLLM, which takes ten seconds of CPU time each time.

Raylet starts a worker as ever. At the start of its Python (``sitecustomize.py``) that one hands its arguments,
variables and standard files over to the fork server, whose fork is the worker; itself, it ends. There is a server for
every raylet and every set of those variables that are read while modules are imported. Like a worker's, the server's
and the forks' parent is the raylet. Nothing else runs in the server: no thread, no event loop.

For the tests' ``served`` alone; all other clusters have workers that import vLLM themselves, as deployments have.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

IMPORTED = (
    "torch._inductor",
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "hycluster.gateway.generation",
    "hycluster.ingress.http",
)
# Of one worker, or read when an engine is made and not at an import.
_LATE = ("RAY_JOB_ID", "RAY_WORKER_ID", "PWD", "OLDPWD", "SHLVL", "_", "TOKENIZERS_PARALLELISM")
_LATE_BEGINNINGS = ("HYCLUSTER_", "VLLM_CPU_", "VLLM_RAY_")
_CLONE_PARENT, _SYS_CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}


def hand_over() -> None:
    """Have the server fork the worker that this process was to be, and end; go on as it if there is no server."""
    raylet = os.getppid()
    kind = {
        name: value for name, value in os.environ.items() if name not in _LATE and not name.startswith(_LATE_BEGINNINGS)
    }
    key = hashlib.sha256(json.dumps([raylet, sorted(kind.items())]).encode()).hexdigest()[:24]
    told = json.dumps([sys.orig_argv[1:], dict(os.environ), os.getcwd(), os.getpgrp()]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, contextlib.suppress(OSError):
        _connect(asking, f"hycluster-forks-{key}", raylet)
        files = array.array("i", [0, 1, 2])
        asking.sendmsg([len(told).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        asking.sendall(told)
        if asking.recv(16):
            os._exit(0)


def _connect(asking: socket.socket, address: str, raylet: int) -> None:
    """To the server, which begins with the first worker.

    Raises:
        OSError: there is none.
    """
    asked = False
    for _ in range(200):
        try:
            asking.connect(f"\0{address}")
            return
        except (ConnectionRefusedError, FileNotFoundError):
            if not asked and not _clone_beside():
                # Its threads would begin with numpy's import.
                os.environ["OPENBLAS_NUM_THREADS"] = "1"
                os.execv(sys.executable, [sys.executable, __file__, address, str(raylet)])
            asked = True
            time.sleep(0.05)
    raise TimeoutError("the fork server does not begin")


def _clone_beside() -> int:
    """As ``os.fork``, but for the parent, which is this process'."""
    ctypes.pythonapi.PyOS_BeforeFork()
    number = _SYS_CLONE[os.uname().machine]
    child = int(ctypes.CDLL(None, use_errno=True).syscall(number, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    if child:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    if child < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return child


def serve(address: str, raylet: int) -> None:
    """Until the raylet has ended. Returns in forks only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            listening.bind(f"\0{address}")
        except OSError:
            return  # Another worker's was first.
        listening.listen(64)
        # Raylet kills a dead worker's group, and this process began as one's.
        os.setpgid(0, 0)
        before = dict(os.environ)
        _import()
        added = {name: value for name, value in os.environ.items() if name not in before}
        while os.getppid() == raylet:
            if not select.select([listening], [], [], 0.2)[0]:
                continue
            asked, _ = listening.accept()
            with asked:
                head, ancillary, _, _ = asked.recvmsg(8, socket.CMSG_LEN(3 * 4))
                files = array.array("i", ancillary[0][2])
                told = json.loads(asked.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
                if _clone_beside():
                    for file in files:
                        os.close(file)
                    continue
                arguments, environment, folder, group = told
                # As long as the process that asks waits, its group is there to be joined.
                os.setpgid(0, group)
                asked.sendall(str(os.getpid()).encode())
            listening.close()
            _become(arguments, {**added, **environment}, folder, files)
            return


def _import() -> None:
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)
    gc.enable()
    gc.freeze()
    running = os.listdir("/proc/self/task")
    assert len(running) == 1, f"a fork has none of the {len(running)} threads"


def _become(arguments: list[str], environment: dict[str, str], folder: str, files: array.array[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    sys.orig_argv[1:] = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
