"""Scripts that need vLLM, each in a process of its own that is forked from one that has imported it.

The import takes ten seconds of CPU time, an engine of a tiny model two. What the forks come from has imported and does
nothing else: there is no thread in it, no engine and no event loop. OpenMP has one thread, as the tiny models need no
more.

    python -m tests.vllm_forks

reads a :class:`Script` a line, as JSON, and answers each by its exit code. Used by the fixture of the same name.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
TIMED_OUT = 124
# With what an engine imports when it is made.
IMPORTED = (
    "torch._inductor",
    "vllm.entrypoints.llm",
    "vllm.lora.request",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)
# What is read when the libraries are loaded, and so is the same for all.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Script:
    """Args: name: a file, or a module. files: where its input is, and where its output and errors go."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    files: list[str]
    timeout_s: float


def cache_root(folder: Path) -> Path:
    """For vLLM, with nothing compiled in it, but with what this user's vLLM has found out of models' classes.

    That takes another import each time, in a process of its own.
    """
    known = Path("~/.cache/vllm/modelinfos").expanduser()
    known.mkdir(parents=True, exist_ok=True)
    root = folder / "vllm"
    root.mkdir()
    (root / known.name).symlink_to(known)
    return root


class VllmForks:
    """Runs scripts, one after the other. The process that they come from begins with the first one.

    Args:
        ends_early: what ends it, by its name; see the fixture.
    """

    def __init__(self, ends_early: dict[str, Callable[[], None]]) -> None:
        self._ends_early = ends_early
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        script: Path | str,
        *arguments: str,
        asked: str = "",
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What it printed.

        Args:
            script: a file, or the name of a module.
            asked: its standard input.
            environment: laid over this process'.

        Raises:
            AssertionError: it failed; with the end of what it said.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/{name}" for name in ("in", "out", "err")]
            Path(files[0]).write_text(asked)
            env = {**os.environ, **THREADS, **(environment or {})}
            told = Script(str(script), list(arguments), env, files, timeout_s)
            process.stdin.write(json.dumps(dataclasses.asdict(told)) + "\n")
            process.stdin.flush()
            code = process.stdout.readline().strip()
            out, errors = (Path(file).read_text(errors="replace") for file in files[1:])
        assert code == "0", f"{script} ended with {code or 'nothing'}: {out[-1000:]}\n{errors[-4000:]}"
        return out

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm_forks"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **THREADS},
            )  # fmt: skip
        self._ends_early["vllm_forks"] = self.close
        return self._process


def serve() -> None:
    """Fork for every line."""
    _import()
    while line := sys.stdin.readline():
        script = Script(**json.loads(line))
        child = os.fork()
        if not child:
            _become(script)
            _end()
        print(_exit_code(child, script.timeout_s), flush=True)
    os._exit(0)


def _import() -> None:
    from hycluster.imports import without_collector

    with without_collector():
        for name in IMPORTED:
            importlib.import_module(name)
    from vllm.v1.executor import multiproc_executor

    # On CPU vLLM asks for spawn, whatever its variable says, and each worker would import for itself.
    vars(multiproc_executor)["get_mp_context"] = _fork_context
    gc.freeze()
    _check_threads()


def _fork_context() -> multiprocessing.context.ForkContext:
    # ZMQ has two, and makes others in a fork: on GPUs vLLM forks beside them too. Once they have names, they wait.
    deadline = time.monotonic() + 60
    while (names := _threads()) and not all(name.startswith("ZMQbg/") for name in names):
        assert time.monotonic() < deadline, f"a fork has none of the threads {names}"
        time.sleep(0.01)
    return multiprocessing.get_context("fork")


def _threads() -> list[str]:
    """But for this one."""
    here = str(os.getpid())
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != here]
    return [task.joinpath("comm").read_text().strip() for task in tasks]


def _check_threads() -> None:
    running = _threads()
    assert not running, f"a fork has none of the threads {running}"


def _end() -> NoReturn:
    """Without taking a million objects apart, which would take seconds: the process' end frees them too."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _exit_code(child: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMED_OUT
        time.sleep(0.05)


def _become(script: Script) -> None:
    """Be the process that runs it, its files in the place of the standard ones."""
    os.setsid()
    for number, (file, how) in enumerate(zip(script.files, "rww", strict=True)):
        with open(file, how) as opened:
            os.dup2(opened.fileno(), number)
    os.environ.clear()
    os.environ.update(script.environment)
    sys.argv = [script.name, *script.arguments]
    if script.name.endswith(".py"):
        runpy.run_path(script.name, run_name="__main__")
    else:
        runpy.run_module(script.name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
