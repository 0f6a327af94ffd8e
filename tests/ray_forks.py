"""Ray's Python workers as forks of a process that has imported what they need.

A worker's import of Ray, pyarrow and hycluster takes one to three seconds of CPU time, of vLLM ten, in every replica,
ingress process and batch executor of every test's cluster. Ray's node is told to run ``ray_forks_launcher.py`` instead
of a worker. That hands its command, environment, folder and standard files to the node's fork server, which the first
one starts, and ends; the fork becomes that worker. A server has one thread, and imports while the first worker waits.
Those that need vLLM come from a second one, itself a fork of the first. Once it is there, so do those that may come to
need it, as a batch job's.

To Ray and to tests a fork is what a worker is otherwise: a child of the node's raylet (which adopts orphans) with the
same environment. What a fork can't be (another interpreter, other values of variables that were read at the import) is
started the usual way.

    RAY_RUNTIME_ENV_HOOK=tests.ray_forks.into_ray

has each ``ray.init`` that starts a node do so.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import runpy
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
# Ray's variable and what it is to be.
RAY_FORKS = ("RAY_RUNTIME_ENV_HOOK", "tests.ray_forks.into_ray")
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
FORKED = b"y"
IMPORTED = ".imported"
MOST_BYTES = 1 << 20
_COMMAND, _SESSION = "--python_worker_command=", "--session_dir="
# The servers' own (``ray_forks_launcher.py``): read when libraries are loaded.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PRELOAD = "LD_PRELOAD"
_LOADED = {*THREADS, _PRELOAD, "JE_ARROW_MALLOC_CONF"}
# Read by a worker itself, after the import.
_LATER = {
    "HYCLUSTER_LOG_FORMAT", "HYCLUSTER_LOG_LEVEL", "RAY_JOB_ID", "RAY_RAYLET_PID", "TOKENIZERS_PARALLELISM",
    "VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS",
}  # fmt: skip
# Read by what only the second server imports.
_WITH_VLLM = ("RAY_SERVE_", "SAGEMAKER_", "VLLM_")


# -- in the process that starts Ray's node ---------------------------------------------------------------------------


def into_ray(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """Ray's hook: the node that this process starts, if it starts one, forks its workers."""
    from ray._private import services

    if not isinstance(services.ConsolePopen, functools.partial):
        vars(services)["ConsolePopen"] = functools.partial(_popen, services.ConsolePopen)
    return runtime_env


def _popen(start: Callable[..., Any], command: list[str], **options: Any) -> Any:
    if is_raylet(command):
        command, _ = with_launcher(command)
        options["preexec_fn"] = functools.partial(_adopting, options["preexec_fn"], ctypes.CDLL(None).prctl)
    return start(command, **options)


def is_raylet(command: Sequence[str]) -> bool:
    return command[0].endswith("/raylet")


def with_launcher(command: Sequence[str]) -> tuple[list[str], str]:
    """A raylet's command with workers by the launcher, and the folder of its sockets."""
    launcher = str(Path(__file__).with_name("ray_forks_launcher.py"))
    (session,) = (word.removeprefix(_SESSION) for word in command if word.startswith(_SESSION))
    through = " ".join([sys.executable, "-I", "-S", launcher, f"{session}/sockets", preloads()])
    usual = f"{_COMMAND}{sys.executable} "
    return [word.replace(usual, f"{_COMMAND}{through} ", 1) for word in command], f"{session}/sockets"


def preloads() -> str:
    """A server's ``LD_PRELOAD``."""
    from hycluster.engine.arguments import _preloads

    return ":".join(_preloads()) or "-"


def _adopting(before: Callable[[], None], prctl: Any) -> None:
    prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    before()


# -- the fork servers ------------------------------------------------------------------------------------------------


def serve(plain: socket.socket, vllm: socket.socket, server: Server) -> NoReturn:
    """Until the raylet has gone.

    Args:
        plain, vllm: listeners, each for a kind of worker.
    """
    raylet = os.pidfd_open(int(os.environ["RAY_RAYLET_PID"]))
    listeners = {plain.fileno(): plain, vllm.fileno(): vllm}
    imported = Path(vllm.getsockname()).with_suffix(IMPORTED)
    while raylet not in (ready := select.select([*listeners, raylet], [], [])[0]):
        if not server.with_vllm and len(listeners) > 1 and vllm.fileno() in ready:
            # Whoever waits there is accepted by the new one.
            server.with_vllm = not os.fork()
            others = plain if server.with_vllm else vllm
            del listeners[others.fileno()]
            others.close()
            continue
        asked, _ = listeners[ready[0]].accept()
        message, files, *_ = socket.recv_fds(asked, MOST_BYTES, 3)
        if message and (worker := server.worker(json.loads(message))):
            if not _fork_orphan():
                for number in (*listeners, raylet, asked.detach()):
                    os.close(number)
                _become(worker, files)
            asked.send(FORKED)
            if server.with_vllm:
                imported.touch()
        for number in (*files, asked.detach()):
            os.close(number)
    os._exit(0)


@dataclasses.dataclass(frozen=True)
class _Worker:
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    group: int
    niceness: int


class Server:
    """Knows what has been imported, and with which environment.

    Args:
        preloaded: this process' ``LD_PRELOAD``.
        with_vllm: import all at once.
        read: what Ray's C++ reads at the import, and a worker's has to be the same.
    """

    def __init__(self, preloaded: str, with_vllm: bool = False, read: Collection[str] = ()) -> None:
        self.with_vllm = with_vllm
        self._preloaded = preloaded.split(":")
        self._read = {name: value for name, value in os.environ.items() if name not in _LOADED}
        self._later = _LATER.difference(read)
        self._unread: tuple[str, ...] = () if with_vllm else _WITH_VLLM
        sys.path[0] = str(ROOT)
        # Not above: a program that is this file has its package only now.
        from tests import ray_imports

        self._import, self._vllm = ray_imports.import_before_forks, ray_imports.VLLM
        self._import(ray_imports.PLAIN + self._vllm if with_vllm else ray_imports.PLAIN)

    def worker(self, request: Mapping[str, Any]) -> _Worker | None:
        """The one that is asked for; None if no fork can be it."""
        context = request["context"]
        environment: dict[str, str] = {**request["environment"], **(context.get("env_vars") or {})}
        usual = context.get("py_executable", sys.executable) == sys.executable
        if not usual or context.get("command_prefix") or context.get("override_worker_entrypoint"):
            return None
        if any("$" in value for value in (context.get("env_vars") or {}).values()):
            return None
        if not self.honours(environment):
            return None
        if self.with_vllm and self._unread:
            self._read |= {name: value for name, value in environment.items() if name.startswith(self._unread)}
            self._unread = ()
            os.environ.update(self._read)
            self._import(self._vllm)
        _, program, *arguments = request["command"]
        return _Worker([program, *arguments], environment, request["folder"], request["group"], request["nice"])

    def honours(self, environment: Mapping[str, str]) -> bool:
        others = {name for name, _ in environment.items() ^ self._read.items()} - self._later - _LOADED
        return (
            # Who imports vLLM without its variables has them by then (``hycluster/logs.py``).
            all(name.startswith(self._unread if name in environment else _WITH_VLLM) for name in others)
            and all(environment.get(name, os.environ[name]) == os.environ[name] for name in THREADS)
            and set(environment.get(_PRELOAD, "").split(":")) <= {"", *self._preloaded}
        )


def _fork_orphan() -> int:
    """As ``os.fork``, but the child's parent is not this process: the raylet adopts it."""
    if between := os.fork():
        os.waitpid(between, 0)
        return between
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    return 0


def _renew() -> None:
    """What our modules make at their import for this process alone."""
    from hycluster.observe import catalogue
    from hycluster.replica import listener

    ingress, key = f"{socket.gethostname()}:{os.getpid()}", os.urandom(len(listener._KEY))
    for before, now in ((catalogue.INGRESS, ingress), (listener._KEY, key)):
        for module in [module for name, module in sys.modules.items() if name.startswith("hycluster.")]:
            vars(module).update({name: now for name, value in vars(module).items() if value is before})


def _become(worker: _Worker, files: Sequence[int]) -> NoReturn:
    """Be the process that runs it."""
    os.setpgid(0, worker.group)
    os.nice(worker.niceness - os.nice(0))
    take_over(worker.folder, worker.environment, files)
    sys.argv = worker.arguments
    # Imports may have put something before the first.
    sys.path[sys.path.index(str(ROOT))] = os.path.dirname(os.path.realpath(worker.arguments[0]))
    sys.modules["numpy"].random.seed()
    _renew()
    run(lambda: runpy.run_path(worker.arguments[0], run_name="__main__"))


def take_over(folder: str, environment: Mapping[str, str], files: Sequence[int]) -> None:
    """Have these, the files as the standard ones."""
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)


def run(program: Callable[[], object]) -> NoReturn:
    """As what this process is for."""
    code = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Without taking a million objects apart, which would take seconds: the process' end frees them too.
    vars(threading)["_shutdown"]()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _plain, _vllm = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    serve(_plain, _vllm, Server(sys.argv[3]))
