"""Who is let in, and that it is meant so."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings

MODEL = {"models": [{"name": "m", "source": "x"}]}


@pytest.mark.parametrize("ingress", ["http", "grpc"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.example", ""])
def test_another_machine_is_let_in_by_keys_or_in_words(ingress: str, host: str) -> None:
    data: dict[str, Any] = {**MODEL, ingress: {"host": host}}
    with pytest.raises(SettingsError) as error:
        validate(Settings, data, "s.yaml")
    assert error.value.message == (
        f"s.yaml: {ingress}.host: {host!r} lets other machines in, and nobody is asked who he is; set"
        " 'access.keys: true', or say that it is meant so: 'access.open: true'"
    )
    for access in ({"keys": True}, {"open": True}):
        validate(Settings, {**data, "access": access}, "s.yaml")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is(host: str) -> None:
    validate(Settings, {**MODEL, "http": {"host": host}, "grpc": {"host": host}}, "s.yaml")


def test_it_can_not_be_both() -> None:
    with pytest.raises(SettingsError, match=r"access\.open: true is not allowed with 'keys' or 'oidc'"):
        validate(Settings, {**MODEL, "access": {"keys": True, "open": True}}, "s.yaml")
