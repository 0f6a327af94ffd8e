"""What a gateway knows of its pool's replicas, as columns for a policy that goes by KV blocks. Pure.

Of a thousand replicas a choice has microseconds for each, so figures are kept where they are needed: a row of a
replica's own for each link, added up when a report comes, and put together by copying bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from hycluster.core import ReplicaLoad
from hycluster.gateway.prefix_router import Column, PoolColumns, StepCost
from hycluster.gateway.sent_work import BULK_PREFILL, DECODING, FIGURES, KV, OUTSTANDING, PREFILL, REQUESTS, SentWork

# Of a replica that has not said how long its steps take: costs are in tokens to prefill.
_UNKNOWN_STEP = StepCost(0.0, 1.0, 0.0, 0.0, 1)


class Standing(Protocol):
    """What of a link to a replica counts."""

    work: SentWork
    others: array[float]
    load: ReplicaLoad | None


def pool_columns(
    links: Sequence[Standing],
    replica_ids: Sequence[str],
    cached_tokens: Column,
    evicts_age_s: Column,
    *,
    step_tokens: int,
    bulk: bool,
) -> PoolColumns:
    """For a request.

    Args:
        replica_ids, cached_tokens, evicts_age_s: of the same replicas.
        step_tokens: of prompts, in one step at most.
        bulk: it is one: what bulk rows have to prefill is before it, while online requests are computed first.
    """
    own, others = np.frombuffer(b"".join([link.work.row for link in links] + [link.others for link in links])).reshape(
        2, len(links), FIGURES
    )
    work = (own + others).T
    return PoolColumns(
        replica_ids=replica_ids,
        prefill_tokens=work[PREFILL] + work[BULK_PREFILL] if bulk else work[PREFILL],
        requests=work[REQUESTS],
        decoding=work[DECODING],
        kv_tokens=work[KV],
        outstanding_tokens=work[OUTSTANDING],
        cached_tokens=cached_tokens,
        evicts_age_s=evicts_age_s,
        step=_step(links, step_tokens),
    )


def _step(links: Iterable[Standing], step_tokens: int) -> StepCost:
    """As the first one has learned of its own steps: they are all alike."""
    for link in links:
        said = link.load.colocation if link.load is not None else None
        if said is not None and said.step_time_s[1] > 0:
            return StepCost(*said.step_time_s, step_tokens)
    return _UNKNOWN_STEP
