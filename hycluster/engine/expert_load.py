"""From the counts of an engine's routers to what a replica reports of its experts' load."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from hycluster.core import ExpertLoad
from hycluster.errors import SettingsError
from hycluster.models.routing import LayerCounts, routed_layers, routing_settings
from hycluster.settings.model import Routing

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor import Executor

# A reading waits for the device, and the engine waits for the reading.
READ_EVERY_S = 15.0


def expert_load_meter(config: VllmConfig, executor: Executor) -> ExpertLoadMeter | None:
    """What reads an engine's expert load; None if the settings do not ask for it.

    Raises:
        SettingsError: there are routing settings, and nothing in this model heeds them.
    """
    routing = routing_settings(config.additional_config)
    if routing == Routing():
        return None
    if not any(executor.collective_rpc(routed_layers)):
        name = config.model_config.served_model_name
        raise SettingsError(f"models: {name}: routing: is not for this model; it has no experts that hycluster routes")
    if not routing.expert_metrics:
        return None
    parallel = config.parallel_config
    # Load balancing (EPLB) moves experts between ranks as it goes.
    contiguous = parallel.enable_expert_parallel and not parallel.enable_eplb
    return ExpertLoadMeter(parallel.tensor_parallel_size * parallel.data_parallel_size if contiguous else None)


class ExpertLoadMeter:
    """Turns successive readings of one engine into :class:`ExpertLoad`.

    The first reading is the zero point: what was routed before it (profiling, warm-up) was nobody's request.

    Args:
        ranks: expert parallel ranks, each with a contiguous share of the experts; None if experts do not lie so.
    """

    def __init__(self, ranks: int | None) -> None:
        self._ranks = ranks
        self._zero: dict[int, list[int]] | None = None
        self._zero_moved = 0
        self._last: dict[int, list[int]] = {}
        self._asked_at = -READ_EVERY_S
        self.load: ExpertLoad | None = None

    def due(self) -> bool:
        """Whether it is time for another reading; true once in :data:`READ_EVERY_S`."""
        now = time.monotonic()
        if now - self._asked_at < READ_EVERY_S:
            return False
        self._asked_at = now
        return True

    def take(self, workers: Sequence[Mapping[int, LayerCounts]]) -> None:
        """Take a reading: by worker and layer, the counts so far.

        Tensor parallel workers route the same tokens, so a layer counts once; pipeline stages have layers of their own.
        """
        counts = {layer: counted for worker in workers for layer, counted in worker.items()}
        tokens = {layer: counted.tokens for layer, counted in counts.items()}
        moved = sum(counted.moved for counted in counts.values())
        if self._zero is None:
            self._zero, self._zero_moved, self._last = tokens, moved, tokens
        since = _difference(tokens, self._last)
        if self.load is not None and not any(map(sum, since.values())):
            return
        self._last = tokens
        total = _difference(tokens, self._zero)
        self.load = ExpertLoad(
            tokens=tuple(map(sum, zip(*total.values(), strict=True))),
            moved=moved - self._zero_moved,
            skew=skew(since.values()),
            rank_skew=skew([by_rank(layer, self._ranks) for layer in since.values()]) if self._ranks else None,
        )


def skew(layers: Iterable[Sequence[int]]) -> float:
    """How much longer the busiest takes than the mean: the sum over layers of the maximum, over that of the mean.

    Layers run one after the other and each waits for its busiest, so this is a step's time over a balanced one's, as
    far as experts make it. 1 without load.
    """
    rows = [row for row in layers if row]
    mean = sum(sum(row) / len(row) for row in rows)
    return sum(max(row) for row in rows) / mean if mean else 1.0


def by_rank(tokens: Sequence[int], ranks: int) -> list[int]:
    """Tokens by expert parallel rank, experts in contiguous shares, the first ranks taking one more if need be."""
    share, more = divmod(len(tokens), ranks)
    ends = list(accumulate(share + (rank < more) for rank in range(ranks)))
    return [sum(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _difference(now: Mapping[int, list[int]], before: Mapping[int, list[int]]) -> dict[int, list[int]]:
    return {layer: [a - b for a, b in zip(row, before[layer], strict=True)] for layer, row in now.items()}
