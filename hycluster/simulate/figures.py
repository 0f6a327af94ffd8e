"""What a simulation says, as plain values; keys carry their unit. A stable form for scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hycluster.simulate.machine import Machine
from hycluster.simulate.outcome import TraceOutcome
from hycluster.simulate.traces import hit_tokens


def at_share(values: Sequence[float], share: float) -> float | None:
    """The least of these values that so large a share of them is not above; None if there are none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def spread_of(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles."""
    found = sorted(values)
    return {
        "mean": sum(found) / len(found) if found else None,
        **{f"p{share}": at_share(found, share / 100) for share in (50, 90, 99)},
    }


def latencies(outcome: TraceOutcome) -> dict[str, Any]:
    """Of the trace's requests that were served."""
    served = [each for each in outcome.served if not each.failed]
    return {
        "ttft_s": spread_of(each.ttft_s for each in served),
        "tpot_s": spread_of(tpot for each in served if (tpot := each.tpot_s) is not None),
    }


def trace_figures(outcome: TraceOutcome, machine: Machine, replicas: int) -> dict[str, Any]:
    """All but what takes another run to know."""
    served = [each for each in outcome.served if not each.failed]
    hours = replicas * outcome.end_s / 3600
    mean = sum(outcome.tokens) / replicas
    asked = [each.request for each in served]
    return {
        "requests": len(outcome.served),
        "failed": len(outcome.served) - len(served),
        "prompt_tokens": sum(request.prompt_tokens for request in asked),
        "output_tokens": sum(request.output_tokens for request in asked),
        "prefix_hit_tokens": sum(each.cached for each in served),
        **latencies(outcome),
        "load_p99_over_mean": (at_share(outcome.tokens, 0.99) or 0) / mean if mean else None,
        # Real time: the one figure that a seed does not fix.
        "decision_us": {f"p{share}": _micro(at_share(outcome.decisions_s, share / 100)) for share in (50, 99)},
        "duration_s": outcome.end_s,
        "busy_share": sum(outcome.busy_s) / sum(outcome.clocks_s) if sum(outcome.clocks_s) else 0.0,
        "steps": outcome.steps,
        "replica_hours": hours,
        "gpu_hours": hours * machine.gpus,
        "bounds": {
            "pooled_lru_hit_tokens": hit_tokens(asked, replicas * machine.kv_tokens),
            "unlimited_hit_tokens": hit_tokens(asked, math.inf),
        },
        "step_times": machine.source,
    }


def _micro(seconds: float | None) -> float | None:
    return seconds * 1e6 if seconds is not None else None
