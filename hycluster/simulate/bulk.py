"""A bulk job beside a trace."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hycluster.core import Priority
from hycluster.simulate.machine import Machine
from hycluster.simulate.traces import TraceRequest

# Rows that a job has in flight at least, by engine.
LEAST_IN_FLIGHT = 256


@dataclass(frozen=True, slots=True)
class BulkRows:
    """Rows of a job. Each engine has so many of them in flight, as long as there are any.

    Attributes:
        endless: there are always more; what is in flight when the trace is over is left there.
    """

    rows: Iterator[TraceRequest]
    in_flight: int
    endless: bool = True
    priority: Priority = Priority.BATCH


def same_rows(prompt_tokens: int, output_tokens: int, in_flight: int, count: int | None = None) -> BulkRows:
    """Rows of one length, without a common prefix; None is without end."""
    row = TraceRequest(0.0, prompt_tokens, output_tokens)
    rows = itertools.repeat(row) if count is None else itertools.repeat(row, count)
    return BulkRows(rows, in_flight, endless=count is None)


@dataclass(frozen=True, slots=True)
class BulkJob:
    """Rows of one length.

    Attributes:
        count: None is without end.
        in_flight: by engine; None is what fills it.
    """

    prompt_tokens: int
    output_tokens: int
    count: int | None = None
    in_flight: int | None = None

    def rows(self, machine: Machine) -> BulkRows:
        in_flight = self.in_flight or max(LEAST_IN_FLIGHT, 2 * int(machine.scheduling.get("max_num_seqs", 0)))
        return same_rows(self.prompt_tokens, self.output_tokens, in_flight, self.count)

    @property
    def endless(self) -> BulkJob:
        return dataclasses.replace(self, count=None, in_flight=None)
