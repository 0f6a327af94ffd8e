"""What callers are promised: by it the alerts burn, and the page says whether it is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objectives:
    """What callers are promised, over 30 days.

    Attributes:
        answered_ratio: of requests that were not shed for overload, and whose caller stayed, those that are answered.
        first_token_s: within so long the first token comes.
        first_token_ratio: of requests, those of which it does.
    """

    answered_ratio: float = 0.995
    first_token_s: float = 2.5
    first_token_ratio: float = 0.95
