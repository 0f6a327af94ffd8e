"""What one replica has of this gateway's requests, and of others', told apart by what is to be done for them. Pure."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from hycluster.core import GatewayWork, ReplicaLoad

if TYPE_CHECKING:
    from hycluster.gateway.flight import Flight

# Places in a row of figures; the first five are the attributes of :class:`GatewayWork`.
PREFILL, REQUESTS, DECODING, KV, BULK_PREFILL, OUTSTANDING = range(6)
FIGURES = 6


class SentWork:
    """Of this gateway.

    Attributes:
        row: figures as above; the last one is its owner's to keep. An array, since those of a thousand replicas are
            looked at together.
    """

    def __init__(self) -> None:
        self.row = array("d", bytes(8 * FIGURES))

    def add(self, flight: Flight) -> None:
        """It is sent there; from now on it counts."""
        self.row[REQUESTS] += 1
        self._to_prefill(flight, flight.prefill_tokens)
        self.row[KV] += flight.prompt_tokens + len(flight.output)

    def take(self, flight: Flight, tokens: int) -> None:
        """Output of it has come; called before the flight takes it."""
        self.row[KV] += tokens
        if not flight.begun:
            self._to_prefill(flight, -flight.prefill_tokens)
            self.row[DECODING] += 1

    def drop(self, flight: Flight) -> None:
        """It is there no more."""
        self.row[REQUESTS] -= 1
        self.row[KV] -= flight.prompt_tokens + flight.output_tokens
        if flight.begun:
            self.row[DECODING] -= 1
        else:
            self._to_prefill(flight, -flight.prefill_tokens)

    def _to_prefill(self, flight: Flight, tokens: int) -> None:
        if flight.bulk:
            self.row[BULK_PREFILL] += tokens
        else:
            self.row[PREFILL] += tokens

    @property
    def told(self) -> GatewayWork:
        """As it is now."""
        prefill, requests, decoding, kv, bulk_prefill = map(int, self.row[:OUTSTANDING])
        return GatewayWork(prefill, requests, decoding, kv, bulk_prefill)


def work_of_others(load: ReplicaLoad | None, gateway_id: str) -> array[float]:
    """What other gateways have there, as a replica last said: a row of the same figures."""
    row = array("d", bytes(8 * FIGURES))
    if load is not None:
        for gateway, work in load.work.items():
            # Its own share of the report is older than what it knows itself.
            if gateway != gateway_id:
                row[PREFILL] += work.prefill_tokens
                row[REQUESTS] += work.requests
                row[DECODING] += work.decoding
                row[KV] += work.kv_tokens
                row[BULK_PREFILL] += work.bulk_prefill_tokens
        row[OUTSTANDING] = sum(tokens for gateway, tokens in load.outstanding_tokens.items() if gateway != gateway_id)
    return row
