"""The newest batches, as whoever looks at the cluster sees them: what was asked of them is not among it."""

from __future__ import annotations

from hycluster.batch_api.records import FINAL, Batch
from hycluster.batch_api.store import Store
from hycluster.state.cluster_state import BatchState

SHOWN = 20


def batch_states(store: Store) -> list[BatchState]:
    """The newest first."""
    return [_state(store, batch) for batch in store.list_batches(None, SHOWN)]


def _state(store: Store, batch: Batch) -> BatchState:
    state = store.state(batch.id)
    ended = state.status in FINAL
    status: str = state.status
    if not ended and store.cancelling_at(batch.id) is not None:
        status = "cancelling"
    why = "waits for online traffic" if state.waiting and not ended else ""
    if state.errors:
        first = state.errors[0]
        why = f"line {first.line}: {first.message}" if first.line is not None else first.message
    return BatchState(
        batch.id,
        batch.endpoint,
        state.model,
        status,
        state.total,
        state.completed,
        state.failed,
        batch.created_at,
        batch.expires_at,
        state.ended_at,
        why,
    )
