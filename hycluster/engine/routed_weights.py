"""What a step reads of a mixture-of-experts model's weights: the experts that its tokens are routed to. Pure.

A dense model's step reads all weights, however few tokens are in it. Here a token is routed to ``top_k`` experts of
each layer, and those that no token of the step is routed to are not read: with few tokens in a step, one more makes it
longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

# From here on the rest is not worth a number.
_ALL = 1 - 1e-4
_MOST_TOKENS = 4096


def experts_touched(experts: int, top_k: int, tokens: float) -> float:
    """Distinct experts that so many tokens are expected to choose, each ``top_k``, evenly and independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens) if experts else 0.0


def busiest_share(experts: int, top_k: int, tokens: float, held: int, ranks: int) -> float:
    """The same on the rank that is expected to have most of them, as a share of what it holds.

    Layer by layer all wait for it. Ranks are taken to be independent, which is too much where tokens are few: no rank
    has more experts than the tokens choose, and some rank has at least a token's even part.

    Args:
        held: experts of a layer that a rank holds.
        ranks: that hold whole experts; 1 where all ranks hold a part of each.
    """
    if not experts:
        return 0.0
    each = experts_touched(experts, top_k, tokens) / experts
    if ranks == 1:
        return each
    below, most = 0.0, 0.0
    for count in range(held):
        below += math.comb(held, count) * each**count * (1 - each) ** (held - count)
        most += 1 - min(1.0, below) ** ranks
    return min(1.0, max(min(most, tokens * top_k), -(-top_k // ranks)) / held)


@dataclass(frozen=True)
class RoutedWeights:
    """A model's routed experts, as far as the time of a step depends on them.

    Attributes:
        experts, top_k: of a layer; and of them, how many a token is routed to.
        held, ranks: as in :func:`busiest_share`.
        share: of the bytes that a step reads if all experts are touched, those of routed experts.
    """

    experts: int
    top_k: int
    held: int
    ranks: int
    share: float

    @cached_property
    def _touched(self) -> tuple[float, ...]:
        found = [0.0]
        while found[-1] < _ALL and len(found) < _MOST_TOKENS:
            found.append(busiest_share(self.experts, self.top_k, len(found), self.held, self.ranks))
        return tuple(found)

    def touched(self, tokens: int) -> float:
        """The share of the routed experts, 0 to 1, that a step of so many tokens reads."""
        return self._touched[tokens] if tokens < len(self._touched) else 1.0
