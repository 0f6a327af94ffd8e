"""What one replica has of this gateway's requests, told apart by what is to be done for them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hycluster.core import GatewayWork

if TYPE_CHECKING:
    from hycluster.gateway.flight import Flight


@dataclass(slots=True)
class SentWork:
    """The attributes are those of :class:`GatewayWork`."""

    prefill_tokens: int = 0
    requests: int = 0
    decoding: int = 0
    kv_tokens: int = 0
    bulk_prefill_tokens: int = 0

    def add(self, flight: Flight) -> None:
        """It is sent there; from now on it counts."""
        self.requests += 1
        self._to_prefill(flight, flight.prefill_tokens)
        self.kv_tokens += flight.prompt_tokens + len(flight.output)

    def take(self, flight: Flight, tokens: int) -> None:
        """Output of it has come; called before the flight takes it."""
        self.kv_tokens += tokens
        if not flight.begun:
            self._to_prefill(flight, -flight.prefill_tokens)
            self.decoding += 1

    def drop(self, flight: Flight) -> None:
        """It is there no more."""
        self.requests -= 1
        self.kv_tokens -= flight.prompt_tokens + flight.output_tokens
        if flight.begun:
            self.decoding -= 1
        else:
            self._to_prefill(flight, -flight.prefill_tokens)

    def _to_prefill(self, flight: Flight, tokens: int) -> None:
        if flight.bulk:
            self.bulk_prefill_tokens += tokens
        else:
            self.prefill_tokens += tokens

    @property
    def told(self) -> GatewayWork:
        """As it is now."""
        return GatewayWork(self.prefill_tokens, self.requests, self.decoding, self.kv_tokens, self.bulk_prefill_tokens)
