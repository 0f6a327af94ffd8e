"""Closing a connection so that nobody is reset: what has been said is still read, and what is still being said is
heard out.

A socket that is closed with something unread in it, or that something arrives at afterwards, answers with a reset,
which also takes from the client what it had not read yet. So this process first says that it will say no more, then
reads on and throws away, for a while (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import Callable
from typing import Any

# Longer than a request takes that was sent before the client could know.
LINGER_S = 1.0


class LingeringTransport:
    """A transport as uvicorn uses one, with another way to close.

    Args:
        most_s: how long a client may go on sending, or leave its answer unread, behind the close.
        most_bytes: how much it may send then.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, most_s: float, most_bytes: int
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._most_s = most_s
        self._most_bytes = most_bytes
        self._closing = False
        self._heard_at = self._end_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Called for every chunk of every stream: no function of ours in between.
        self.write: Callable[[bytes], None] = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Say nothing more; :meth:`heard` is to be called for what comes from now on."""
        if self.is_closing():
            return
        self._closing = True
        self.write = _unsaid
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()
        self._heard_at = self._loop.time()
        self._end_at = self._heard_at + self._most_s
        self._look()

    def abort(self) -> None:
        self._transport.abort()

    def heard(self, size: int) -> None:
        """The client goes on."""
        self._heard_at = self._loop.time()
        self._most_bytes -= size
        if self._most_bytes < 0:
            self._transport.abort()

    def unread(self) -> bool:
        """Whether something has come that this process has not been given yet."""
        if self._transport.is_closing():
            return False
        sock: Any = self._transport.get_extra_info("socket")
        (size,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, struct.pack("i", 0)))
        return bool(size)

    def lost(self) -> None:
        """There is no connection any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        quiet_at = self._heard_at + LINGER_S
        if now >= self._end_at:
            self._transport.abort()
        elif self._transport.get_write_buffer_size() or now < quiet_at:
            next_at = max(quiet_at, now + LINGER_S / 4)
            self._timer = self._loop.call_at(min(next_at, self._end_at), self._look)
        else:
            self._transport.close()


def _unsaid(_: Any) -> None:
    """Written behind the close."""
