"""What outputs are to look like, by schema, regex or grammar: none of a caller's making is compiled in this process
before another one has survived it.

vLLM checks them where it takes requests: here, beside all other streams. One of 150 bytes can take minutes and
gigabytes. So each that has not been seen lately first goes to a process of its own (``grammar_worker.py``), which ends
with it if it costs too much; only then vLLM is asked whether it is any good, by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hycluster.errors import InvalidInput, Overloaded, Unavailable
from hycluster.gateway import grammar_worker
from hycluster.gateway.grammar_bounds import check_counts
from hycluster.settings.load import Admission

KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
# Each on a CPU of its own: a costly one is not to hold up those behind it.
WORKERS = 2
MAX_WAITING = 256
REMEMBERED = 1024
# For a machine that is busy with something else, on top of the CPU time.
START_S, PATIENCE_S = 60.0, 30.0
# How a process ends that was not ended by what it was asked: it had grown, or somebody ends processes here.
_NOT_BY_THAT = (0, -signal.SIGKILL, -signal.SIGTERM)


class GrammarCheck:
    """Tries out grammars in other processes.

    Args:
        tokenizer: the model's, as a ``tokenizer.json``; None if it is of another kind.
    """

    def __init__(self, bounds: Admission, tokenizer: Callable[[], str | None] = lambda: None) -> None:
        self._bounds = bounds
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")
        # What has been checked is not to wait for what is being checked.
        self._here = ThreadPoolExecutor(1, thread_name_prefix="grammar here")
        self._closed = False
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._waiting = 0
        # By their digests; what is wrong with them, if anything is.
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, asked: Any, then: Callable[[], None] = lambda: None) -> None:
        """Refuse what would cost too much.

        Args:
            asked: vLLM's ``StructuredOutputsParams``.
            then: called by a thread for what costs not too much.

        Raises:
            InvalidInput: names the field and what is allowed.
            Overloaded: too many wait already.
            Unavailable: nothing can be checked here.
        """
        for kind in KINDS:
            if (value := getattr(asked, kind)) is not None:
                await self._check(kind, value if isinstance(value, str) else json.dumps(value), then)
                return
        then()

    async def _check(self, kind: str, spec: str, then: Callable[[], None]) -> None:
        most = self._bounds.max_grammar_kib << 10
        if len(spec) > most:
            raise InvalidInput(f"structured_outputs.{kind}: is {len(spec)} bytes; at most {most} are allowed")
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"structured_outputs: {self._waiting} of them wait to be checked", retry_after_s=1)
        digest = hashlib.sha256(f"{kind} {spec}".encode(errors="surrogatepass")).digest()
        self._waiting += 1
        try:
            if digest in self._known:
                self._known.move_to_end(digest)
                wrong = self._known[digest]
            else:
                loop = asyncio.get_running_loop()
                wrong = self._known[digest] = await loop.run_in_executor(self._threads, self._wrong, kind, spec)
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            if wrong is not None:
                raise InvalidInput(wrong)
            await asyncio.get_running_loop().run_in_executor(self._here, then)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the processes; nothing is checked any more. Waits for what is being checked, which ends at once."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        self._here.shutdown(cancel_futures=True)
        for worker in list(self._workers):
            self._lose(worker)

    # -- in a thread --------------------------------------------------------------------------------

    def _wrong(self, kind: str, spec: str) -> str | None:
        try:
            check_counts(kind, spec, self._bounds.max_grammar_repeats)
        except InvalidInput as error:
            return error.message
        for last in (False, True):
            worker = self._worker()
            try:
                out_of_memory = worker.ask(kind, spec, self._tokenizer)
            except (EOFError, OSError, TimeoutError):
                if self._lose(worker) in _NOT_BY_THAT and not last and not self._closed:
                    continue
                return self._too_much(kind)
            return self._too_much(kind) if out_of_memory else None
        return None

    def _too_much(self, kind: str) -> str:
        seconds, mib = self._bounds.grammar_timeout_s, self._bounds.grammar_memory_mib
        return f"structured_outputs.{kind}: takes more to compile than is allowed, {seconds:g} s of a CPU and {mib} MiB"

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is not None and worker.ended:
            self._lose(worker)
            worker = None
        if worker is None:
            worker = _Worker(self._bounds.grammar_timeout_s, self._bounds.grammar_memory_mib << 20)
            self._workers.add(worker)
            self._local.worker = worker
            if self._closed:
                worker.kill()
            worker.await_start()
        return worker

    def _lose(self, worker: _Worker) -> int | None:
        """How it ended; None if that was by us."""
        self._local.worker = None
        self._workers.discard(worker)
        return worker.end()


class _Worker:
    """One process, that does one after the other."""

    def __init__(self, cpu_s: float, memory_bytes: int) -> None:
        self.late = False
        self._cpu_s = cpu_s
        self._knows_tokenizer = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(grammar_worker.__file__)), str(cpu_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """Whoever waits for it hears so, and tidies up."""
        self._process.kill()

    def await_start(self) -> None:
        """
        Raises:
            Unavailable: the process does not start, which is nobody's fault who asked.
        """
        try:
            self._read(START_S)
        except (EOFError, OSError, TimeoutError):
            self.end()
            raise Unavailable("structured_outputs: the process that checks them does not start") from None

    def ask(self, kind: str, spec: str, tokenizer: Callable[[], str | None]) -> bool:
        """Whether memory did not suffice. It may end of it as well.

        Raises:
            EOFError, OSError: it has ended.
            TimeoutError: it does not answer.
        """
        assert self._process.stdin is not None
        told = None
        if kind == "grammar" and not self._knows_tokenizer:
            # Only grammars name tokens; it takes a second to read.
            told, self._knows_tokenizer = tokenizer(), True
        grammar_worker.write(self._process.stdin, {"kind": kind, "spec": spec, "tokenizer": told})
        answer = self._read(self._cpu_s + PATIENCE_S)
        return bool(answer["memory"])

    def _read(self, within_s: float) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + within_s
        if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self.late = True
            raise TimeoutError
        return grammar_worker.read(self._process.stdout)

    def end(self) -> int | None:
        """Its exit status; None if it had to be ended."""
        status: int | None = None
        try:
            # One whose pipe has ended is about to have.
            status = self._process.wait(0 if self.late else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it did not read is tried again
                assert pipe is not None
                pipe.close()
        return status
