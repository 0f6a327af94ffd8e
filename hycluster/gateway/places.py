"""Places that a request was let in for, until it is sent to the engines.

vLLM asks twice whether there is room: before it begins an answer, and as it sends the request. In between lie the
rendering of its prompt and, of a stream, the status 200. Who was let in must not be refused then, and those who come
meanwhile must find the place taken: so it is held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from hycluster.errors import HyclusterError


class CountedPlaces(Protocol):
    """What lets requests in.

    Attributes:
        held: places of requests that it has let in, and that have not been sent.
    """

    held: int

    def left(self, places: int) -> None:
        """Whoever asked has left, with so many that were not sent."""


class HeldPlaces:
    """Those of one request.

    Attributes:
        refusal: why it has been refused; what an API's own form of it does not say, its headers do.
        left: its caller has gone.
    """

    def __init__(self) -> None:
        self.refusal: HyclusterError | None = None
        self.left = False
        self._held: dict[CountedPlaces, int] | None = {}

    def of(self, gate: CountedPlaces) -> int:
        """How many it holds."""
        return self._held.get(gate, 0) if self._held else 0

    def hold(self, gate: CountedPlaces, places: int) -> None:
        """It has been let in for so many in all. Does nothing once the request has ended."""
        if self._held is not None:
            gate.held += places - self.of(gate)
            self._held[gate] = places

    def take(self, gate: CountedPlaces, places: int) -> bool:
        """It sends so many; False if it does not hold them."""
        if self._held is None or self.of(gate) < places:
            return False
        self._held[gate] -= places
        gate.held -= places
        return True

    def end(self) -> None:
        """What it has not sent it will not send."""
        for gate, places in (self._held or {}).items():
            gate.held -= places
            if self.left and places:
                gate.left(places)
        # An error holds on to all that was there when it was raised.
        self._held = self.refusal = None


current_places: ContextVar[HeldPlaces | None] = ContextVar("current_places", default=None)


@contextmanager
def holding_places() -> Iterator[HeldPlaces]:
    """Around a request: what it is let in for is held for it."""
    places = HeldPlaces()
    before = current_places.set(places)
    try:
        yield places
    except (asyncio.CancelledError, GeneratorExit):
        places.left = True
        raise
    finally:
        current_places.reset(before)
        places.end()
