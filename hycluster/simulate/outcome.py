"""What came of a trace on engines in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hycluster.simulate.traces import TraceRequest


@dataclass(slots=True)
class Served:
    """One request of the trace, and what became of it. Times are on the trace's clock."""

    request: TraceRequest
    replica: int = -1
    first_s: float = math.nan
    last_s: float = math.nan
    cached: int = 0

    @property
    def failed(self) -> bool:
        return self.replica < 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    @property
    def tpot_s(self) -> float | None:
        """Between two tokens, on average; None if it has only one."""
        more = self.request.output_tokens - 1
        return (self.last_s - self.first_s) / more if more > 0 else None


@dataclass(slots=True)
class BulkDone:
    """What of a job was done while the trace lasted.

    Attributes:
        all_rows, all_output_tokens: also before and after it.
        over_s: when the last row so far was over, counted from the trace's begin.
    """

    output_tokens: int = 0
    rows: int = 0
    all_rows: int = 0
    all_output_tokens: int = 0
    over_s: float = 0.0


@dataclass(slots=True)
class TraceOutcome:
    """What came of it.

    Attributes:
        window_s: how long the trace lasted: from its first arrival to its last, or as long as was asked for.
        end_s: when all was over, counted from the trace's begin.
        busy_s, clocks_s: by engine, how long it computed, and for how long it was there.
        tokens: by engine, prompt and output tokens of the trace that it was given.
        decisions_s: real seconds that each choice of a replica took.
    """

    served: list[Served]
    bulk: BulkDone
    window_s: float
    end_s: float = 0.0
    busy_s: list[float] = field(default_factory=list)
    clocks_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    decisions_s: list[float] = field(default_factory=list)
