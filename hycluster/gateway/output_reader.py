"""Reads what a replica says as the event loop finds its socket readable, without a future for each message.

pyzmq's asyncio sockets take 51 to 64 us of CPU time for a message, this 18 to 22 (``docs/measurements.md``).

A ZMQ socket's descriptor becomes readable when the socket's state changes, not while there are messages: whoever has
been woken reads until there are none, or says himself that he has to be woken again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

# Read without a pause; whoever else has something to do in the event loop comes in between.
MOST_AT_ONCE = 64


class OutputReader:
    """Reads one socket, from when it is made until it is closed. In the event loop's own thread.

    Args:
        heard: gets each message's frames, in the order in which they came.
    """

    def __init__(self, sock: zmq.Socket[bytes], heard: Callable[[list[zmq.Frame]], None]) -> None:
        self._sock = sock
        self._heard = heard
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = sock.fileno()
        self._loop.add_reader(self._descriptor, self._readable)
        # What came before is told by no descriptor.
        self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        more = True
        try:
            more = self.read()
        finally:
            # Also if one of them was wrong: those behind it have been told of already.
            if more:
                self._loop.call_soon(self._readable)

    def read(self) -> bool:
        """Take what has come; True if that were so many that there may be more."""
        for _ in range(MOST_AT_ONCE):
            if self._closed:
                return False
            try:
                frames = self._sock.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._heard(frames)
        return True

    def close(self) -> None:
        """Read no more; before the socket is closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
