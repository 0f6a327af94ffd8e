"""What a model's tokens cost."""

from __future__ import annotations

from decimal import Decimal

from pydantic import Field

from hycluster.settings.base import Strict

MILLION = 1_000_000


class Price(Strict):
    """What a million tokens of a model cost, in ``auth.currency``; a model without a price costs nothing.

    Attributes:
        prompt_per_million_tokens: of prompts.
        cached_per_million_tokens: of those tokens of prompts whose KV was there already; null is as the others'.
        completion_per_million_tokens: of what is generated.
    """

    prompt_per_million_tokens: Decimal = Field(default=Decimal(0), ge=0, le=MILLION)
    cached_per_million_tokens: Decimal | None = Field(default=None, ge=0, le=MILLION)
    completion_per_million_tokens: Decimal = Field(default=Decimal(0), ge=0, le=MILLION)


def cost_of(price: Price | None, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Decimal:
    """What a request costs, exactly.

    Args:
        cached_tokens: those of ``prompt_tokens`` that were in the KV cache.
    """
    if price is None:
        return Decimal(0)
    cached = price.cached_per_million_tokens
    if cached is None:
        cached = price.prompt_per_million_tokens
    return (
        (prompt_tokens - cached_tokens) * price.prompt_per_million_tokens
        + cached_tokens * cached
        + completion_tokens * price.completion_per_million_tokens
    ) / MILLION
