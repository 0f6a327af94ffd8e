from __future__ import annotations

from decimal import Decimal

import pytest

from hycluster.errors import SettingsError
from hycluster.settings.price import Price, cost_of
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings


def test_what_is_cached_has_its_own_price() -> None:
    price = Price(
        prompt_per_million_tokens=Decimal("0.1"),
        cached_per_million_tokens=Decimal("0.025"),
        completion_per_million_tokens=Decimal("0.4"),
    )
    assert cost_of(price, 1_000_000, 400_000, 500_000) == Decimal("0.06") + Decimal("0.01") + Decimal("0.2")
    assert cost_of(price.model_copy(update={"cached_per_million_tokens": None}), 10, 10, 0) == Decimal("0.000001")


def test_without_a_price_it_costs_nothing() -> None:
    assert cost_of(None, 1, 0, 1) == cost_of(Price(), 1, 0, 1) == 0


def test_it_is_a_models() -> None:
    data = {"models": [{"name": "m", "source": "x", "price": {"completion_per_million_tokens": 0.6}}]}
    price = validate(Settings, data, "s.yaml").models[0].price
    assert price is not None
    # As it was typed, and not as binary fractions have it.
    assert price.completion_per_million_tokens == Decimal("0.6")
    data["models"][0]["price"] = {"completion_per_million_tokens": -1}
    with pytest.raises(SettingsError, match=r"models\.0\.price\.completion_per_million_tokens"):
        validate(Settings, data, "s.yaml")


def test_the_currency_is_a_code() -> None:
    data = {"models": [{"name": "m", "source": "x"}], "auth": {"currency": "dollars"}}
    with pytest.raises(SettingsError, match=r"auth\.currency"):
        validate(Settings, data, "s.yaml")
