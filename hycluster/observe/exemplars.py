"""What an observed duration points at: the trace of the request that took so long.

Whoever traces a request says so here, for as long as the request's task runs; histograms of our own ask when they
observe. Only OpenMetrics has exemplars, which a scrape gets that asks for it (``Accept``).
"""

from __future__ import annotations

from contextvars import ContextVar

# As Prometheus' and Grafana's own label for it.
TRACE_ID = "trace_id"
traced: ContextVar[str | None] = ContextVar("traced", default=None)


def exemplar() -> dict[str, str] | None:
    """For the request of this task; None where it is not traced, or its trace not sampled."""
    trace_id = traced.get()
    return {TRACE_ID: trace_id} if trace_id else None
