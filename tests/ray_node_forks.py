"""Ray's nodes in namespaces of their own (``nodes.py``), whose workers are forks of one process for all nodes.

``ray_forks.py`` imports vLLM once a node. Here a node has one worker that needs it, so nodes are forks themselves, of a
process outside of them that has imported all. In a node,

    python -m tests.ray_node_forks SOCKET ARGUMENT ...

is ``ray start`` with these arguments: it has that process fork, and ends as the fork does. The fork enters the network,
mounts, pids and user that the asking process has, with its limits and niceness, and gives up all rights. Before it runs
Ray's command, so before it has threads, it leaves a process that is to become the raylet and, before that, forks what
the workers come from: so that is the raylet's child, and so are the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.ray_forks import (
    ADOPT_ORPHANS,
    FORKED,
    IMPORTED,
    MOST_BYTES,
    THREADS,
    Server,
    is_raylet,
    preloads,
    run,
    serve,
    take_over,
    with_launcher,
)

ROOT = Path(__file__).parents[1]
MODULE = "tests.ray_node_forks"
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_MOUNT = 0x10000000, 0x20000000, 0x40000000, 0x00020000
_DIE_WITH_PARENT, _DUMPABLE, _DROP_BOUNDING, _NO_NEW_PRIVILEGES, _AMBIENT = 1, 4, 24, 38, 47
_CLEAR_ALL = 4
_JOB = "RAY_JOB_ID"
_LIBC = ctypes.CDLL(None, use_errno=True)
# What a raylet gives to each worker. The job is that of all of Serve's: of whoever started its controller, the first.
_OF_RAYLETS = {"RAY_LD_PRELOAD_ON_WORKERS": "0", "SPT_NOENV": "1", _JOB: "01000000"}
# With whom a worker ends, for Ray's C++, which reads it at the import. In a node that is its first process.
RAYLET = {"RAY_RAYLET_PID": "1"}
# bash's own.
_SHELL = ("_", "OLDPWD", "PWD", "SHLVL")


# -- in the process that starts nodes --------------------------------------------------------------------------------


@contextlib.contextmanager
def forks_for_nodes(folder: Path, environment: Mapping[str, str], for_vllm: Mapping[str, str]) -> Iterator[str]:
    """While this lasts, nodes are forked; the socket by which they ask.

    Args:
        environment: of each node.
        for_vllm: laid over it, of each worker that needs vLLM.
    """
    path = str(folder / "forks")
    preloaded = preloads()
    own = {**environment, **_OF_RAYLETS, **RAYLET, **for_vllm, **dict.fromkeys(THREADS, "1")}
    own |= {"LD_PRELOAD": preloaded, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        # Whom the node's user is to reach.
        os.chmod(path, 0o666)
        listener.listen(64)
        # As nice as a node, which waits for it. Ray writes a title over the arguments; these leave room for one.
        command = [
            "nice",
            "-n",
            "-10",
            sys.executable,
            "-m",
            MODULE,
            "--serve",
            str(listener.fileno()),
            preloaded,
            "-" * 1000,
        ]
        process = subprocess.Popen(command, env=own, cwd=ROOT, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
    try:
        yield path
    finally:
        process.kill()
        process.wait()


# -- in a node -------------------------------------------------------------------------------------------------------


def ask(path: str, arguments: list[str]) -> NoReturn:
    """Be Ray's command in the node that this process is in."""
    environment = {name: value for name, value in os.environ.items() if name not in _SHELL}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        request = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        if server.recv(1) == FORKED:
            sys.exit(ord(server.recv(1) or b"\1"))
    os.execv(sys.executable, [sys.executable, "-m", "ray.scripts.scripts", *arguments])


# -- in the process that all come from -------------------------------------------------------------------------------


def fork_nodes(listener: socket.socket, preloaded: str) -> NoReturn:
    """Until it is killed."""
    _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    server = Server(preloaded, with_vllm=True, read={_JOB})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listener.accept()
        message, files, *_ = socket.recv_fds(asked, MOST_BYTES, 3)
        request = json.loads(message) if message else {}
        if message and server.honours(request["environment"] | _OF_RAYLETS):
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _hold(asked, server, request, files)
        elif message:
            asked.send(b"n")
        for number in (*files, asked.detach()):
            os.close(number)


def _hold(asked: socket.socket, server: Server, request: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """Fork into the node that asks, and tell it of the fork's end; only children are in another pid namespace."""
    peer, _, _ = struct.unpack("3i", asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    node = os.pidfd_open(peer)
    os.setsid()
    with contextlib.suppress(OSError):
        nice = Path(f"/proc/{peer}/autogroup").read_text().split()[-1]
        Path("/proc/self/autogroup").write_text(nice)
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, peer))
    for limit in (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")):
        resource.setrlimit(limit, resource.prlimit(peer, limit))
    as_user = os.stat(f"/proc/{peer}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino
    _call("setns", node, _NEW_PID)
    if not (fork := os.fork()):
        _call("setns", node, _NEW_NET | _NEW_MOUNT)
        if as_user:
            _call("setns", node, _NEW_USER)
        for number in (node, asked.detach()):
            os.close(number)
        _without_rights()
        _start(server, request, files)
    asked.send(FORKED)
    for number in files:
        os.close(number)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    with contextlib.suppress(OSError):  # the node has been killed
        asked.send(bytes([code % 256]))
    os._exit(0)


def _call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def _without_rights() -> None:
    """As ``nodes.py`` begins a node's command."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for right in range(last + 1):
        _call("prctl", _DROP_BOUNDING, right, 0, 0, 0)
    _call("prctl", _AMBIENT, _CLEAR_ALL, 0, 0, 0)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    # Version 3, for this process; none is effective, permitted or inheritable.
    if _LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
    _call("prctl", _DUMPABLE, 1, 0, 0, 0)


def _start(server: Server, request: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """Be Ray's command."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not (raylet := os.fork()):
        here.close()
        for number in files:
            os.close(number)
        _await_raylet(there, server)
    there.close()
    take_over(request["folder"], request["environment"], files)

    from ray._private import services

    vars(services)["ConsolePopen"] = functools.partial(_popen, services.ConsolePopen, _Waiting(raylet, here))
    sys.argv = ["ray", *request["arguments"]]
    run(lambda: runpy.run_module("ray.scripts.scripts", run_name="__main__", alter_sys=True))


# -- the raylet ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """The process that is to become it, and where it is told its command."""

    pid: int
    told: socket.socket


def _popen(start: Callable[..., Any], waiting: _Waiting, command: list[str], **options: Any) -> Any:
    return _Raylet(waiting, command, **options) if is_raylet(command) else start(command, **options)


class _Raylet(subprocess.Popen[bytes]):
    """Of a process that there is already."""

    def __init__(self, waiting: _Waiting, command: list[str], **options: Any) -> None:
        self._waiting = waiting
        super().__init__(command, **options)

    def _execute_child(self, args: list[str], *others: Any) -> None:
        """Python 3.11's."""
        _, _, _, _, folder, environment, _, _, _, files_in, _, _, out, _, errors, *_ = others
        self.pid = self._waiting.pid
        files = [own if given == -1 else given for own, given in enumerate((files_in, out, errors))]
        request = {"command": args, "folder": folder or os.getcwd(), "environment": environment}
        socket.send_fds(self._waiting.told, [json.dumps(request).encode()], files)
        self._waiting.told.close()
        vars(self)["_child_created"] = True


def _await_raylet(told: socket.socket, server: Server) -> NoReturn:
    message, files, *_ = socket.recv_fds(told, MOST_BYTES, 3)
    if not message:
        os._exit(0)
    request = json.loads(message)
    told.close()
    # As Ray has it, and ``ray_forks.py``.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _call("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _call("prctl", ADOPT_ORPHANS, 1, 0, 0, 0)
    command, sockets = with_launcher(request["command"])
    _leave_server(f"{sockets}/forks-{os.getpid()}", server, files)
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    take_over(request["folder"], {}, files)
    os.execve(command[0], command, request["environment"])


def _leave_server(path: str, server: Server, files: Sequence[int]) -> None:
    """Where ``ray_forks_launcher.py`` looks for one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.vllm")
    listener.listen(64)
    Path(f"{path}.plain").symlink_to(f"{path}.vllm")
    Path(f"{path}{IMPORTED}").touch()
    raylet = os.getpid()
    if not os.fork():
        os.setpgid(0, 0)
        for number in files:
            os.close(number)
        os.environ["RAY_RAYLET_PID"] = str(raylet)
        serve(listener, listener, server)
    listener.close()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        fork_nodes(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
    ask(sys.argv[1], sys.argv[2:])
