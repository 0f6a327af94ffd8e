"""Lines that a peer can cause: however many it causes, a few are written."""

from __future__ import annotations

import logging
import threading
import time

# Of one kind of line; the first comes at once.
EVERY_S = 10.0


class SparingLog:
    """Writes one kind of line at most once in ``EVERY_S``, and says how many there were since the one before."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        self._lock = threading.Lock()
        self._last_s: float | None = None
        self._left_out = 0

    def write(self, message: str, *arguments: object, exc_info: bool = False) -> None:
        """Write it, or count it."""
        with self._lock:
            now = time.monotonic()
            if self._last_s is not None and now - self._last_s < EVERY_S:
                self._left_out += 1
                return
            more, self._left_out, self._last_s = self._left_out, 0, now
        if more:
            message, arguments = f"{message} (and %d like it since the last line)", (*arguments, more)
        self._logger.log(self._level, message, *arguments, exc_info=exc_info)
