"""Says a line if this process ends without a chance to: Ray's C++ ends a driver at once when its cluster is gone.

No handler and no ``finally`` runs then. So another process, which knows nothing but that line, holds the reading end of
a pipe: it comes to its end when this process does, however that came about.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

# Ctrl-C goes to all of a terminal's processes, and is no end of this one.
_WAITS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if not os.read(0, 1):
    os.write(2, (sys.argv[1] + "\\n").encode(errors="replace"))
"""


@contextmanager
def told_if_sudden(line: str) -> Iterator[Callable[[], None]]:
    """While the block lasts: should this process end within it, ``line`` is printed to its standard error.

    Yields what makes that needless, for who ends this process with words of his own.
    """
    try:
        sys.stderr.fileno()
    except OSError:
        # In memory, of a caller within this process, who sees its end by himself.
        yield lambda: None
        return
    # Its standard error as it is now: Ray's words may have the descriptor.
    command = [sys.executable, "-I", "-S", "-c", _WAITS, line]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=sys.stderr) as waiting:
        assert waiting.stdin is not None
        pipe: IO[bytes] = waiting.stdin

        def dismiss() -> None:
            with suppress(BrokenPipeError, ValueError):
                pipe.write(b".")
                pipe.close()

        try:
            yield dismiss
        finally:
            dismiss()
