"""What callers are promised."""

from __future__ import annotations

from pydantic import Field, field_validator

from hycluster.errors import shown
from hycluster.settings.base import Strict

# Of vLLM's histogram of first tokens, which knows of no time between them.
FIRST_TOKEN_BOUNDS_S = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)


class Objectives(Strict):
    """What callers are promised, over 30 days. The page and ``hycluster status`` hold the last hour against it; alerts
    burn by it that ``hycluster metrics rules SETTINGS`` makes.

    Attributes:
        answered_ratio: of requests that were not shed for overload, and whose caller stayed, those that are answered.
        first_token_s: within so long the first token comes; a bound of vLLM's histogram: 0.1, 0.25, 0.5, 0.75, 1, 2.5,
            5, 7.5, 10, 20 or 40.
        first_token_ratio: of requests, those of which it does.
    """

    answered_ratio: float = Field(default=0.995, gt=0, lt=1)
    first_token_s: float = 2.5
    first_token_ratio: float = Field(default=0.95, gt=0, lt=1)

    @field_validator("first_token_s")
    @classmethod
    def _is_a_bound(cls, seconds: float) -> float:
        if seconds not in FIRST_TOKEN_BOUNDS_S:
            bounds = ", ".join(f"{bound:g}" for bound in FIRST_TOKEN_BOUNDS_S)
            raise ValueError(f"{shown(seconds)} is not allowed; must be a bound of vLLM's histogram: {bounds}")
        return seconds
