"""Scripts, each in a process of its own that is forked from one that has imported what they need.

An import of vLLM takes ten seconds of CPU time, of the command line half a second. What the forks come from has
imported and does nothing else: there is no thread in it and no event loop. OpenMP has one thread, which is enough.

    python -m tests.forks MODULE...

imports the modules, reads a :class:`Script` a line, as JSON, and answers each by its exit code. What is read from the
environment at an import is that of the first script's caller.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
TIMED_OUT = 124
# What is read when the libraries are loaded, and so is the same for all.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Script:
    """Args: name: a file, or a module. files: where its input is, and where its output and errors go."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: list[str]
    timeout_s: float


class Forks:
    """Runs scripts, one after the other. The process that they come from begins with the first one.

    Args:
        imported: modules; with them no thread may start.
    """

    def __init__(self, imported: Sequence[str]) -> None:
        self._imported = imported
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        script: Path | str,
        *arguments: str,
        asked: str = "",
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """As :func:`subprocess.run` has it; after a timeout the exit code is :data:`TIMED_OUT`.

        Args:
            script: a file, or the name of a module.
            asked: its standard input.
            environment: laid over this process'.
            folder: that it runs in.

        Raises:
            AssertionError: there is no process any more that it could come from.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as made:
            files = [f"{made}/{name}" for name in ("in", "out", "err")]
            Path(files[0]).write_text(asked)
            env = {**os.environ, **THREADS, **(environment or {})}
            told = Script(str(script), list(arguments), env, str(folder), files, timeout_s)
            process.stdin.write(json.dumps(dataclasses.asdict(told)) + "\n")
            process.stdin.flush()
            code = process.stdout.readline().strip()
            assert code, f"no process for {script}; it began with {self._imported}"
            out, errors = (Path(file).read_text(errors="replace") for file in files[1:])
        return subprocess.CompletedProcess([str(script), *arguments], int(code), out, errors)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", *self._imported],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **THREADS},
            )  # fmt: skip
        return self._process


def serve(imported: Sequence[str]) -> None:
    """Fork for every line."""
    _import(imported)
    while line := sys.stdin.readline():
        script = Script(**json.loads(line))
        child = os.fork()
        if not child:
            _become(script)
            _end()
        print(_exit_code(child, script.timeout_s), flush=True)
    os._exit(0)


def _import(imported: Sequence[str]) -> None:
    from hycluster.imports import without_collector

    with without_collector():
        for name in imported:
            importlib.import_module(name)
    gc.freeze()
    running = os.listdir("/proc/self/task")
    assert len(running) == 1, f"a fork has none of the {len(running)} threads"


def _end() -> NoReturn:
    """Without taking a million objects apart, which would take seconds: the process' end frees them too."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _exit_code(child: int, timeout_s: float) -> int:
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], timeout_s)[0]:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMED_OUT
    finally:
        os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(script: Script) -> None:
    """Be the process that runs it, its files in the place of the standard ones."""
    os.setsid()
    os.chdir(script.folder)
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
    serve(sys.argv[1:])
