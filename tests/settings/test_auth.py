"""Who is let in, and that it is meant so."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hycluster.batch.job import Job
from hycluster.errors import SettingsError
from hycluster.explain import PATTERNS
from hycluster.settings.base import LABEL_KEY, LABEL_VALUE
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
        " 'auth.enabled: true', or say that it is meant so: 'auth.open: true'"
    )
    for auth in ({"enabled": True}, {"open": True}):
        validate(Settings, {**data, "auth": auth}, "s.yaml")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is(host: str) -> None:
    validate(Settings, {**MODEL, "http": {"host": host}, "grpc": {"host": host}}, "s.yaml")


@pytest.mark.parametrize(
    ("auth", "says"),
    [
        (
            {"tls": {"certificate": "tls.crt", "key": "/tls.key"}},
            "auth.tls.certificate: 'tls.crt' is not allowed: must be an absolute path",
        ),
        ({"currency": "USD"}, "auth.currency: 'USD' is not allowed: must be three small letters, such as 'usd'"),
    ],
)
def test_what_a_text_must_be_is_said_in_words(auth: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as error:
        validate(Settings, {**MODEL, "auth": auth}, "s.yaml")
    assert error.value.message == f"s.yaml: {says}"


def test_every_pattern_has_words() -> None:
    """But those of labels, whose rule is Kubernetes' own."""
    patterns = set(
        re.findall(r'"pattern": "(.*?)"[,}]', json.dumps([Settings.model_json_schema(), Job.model_json_schema()]))
    )
    assert {json.loads(f'"{each}"') for each in patterns} - {LABEL_KEY, LABEL_VALUE} <= set(PATTERNS)


def test_it_can_not_be_both() -> None:
    with pytest.raises(SettingsError, match=r"auth\.open: true is not allowed with 'enabled: true'"):
        validate(Settings, {**MODEL, "auth": {"enabled": True, "open": True}}, "s.yaml")


@pytest.mark.parametrize("weight", [0, -1, 1e-17, 1001, float("inf"), float("nan")])
def test_weights_that_none_can_have(weight: float) -> None:
    with pytest.raises(SettingsError, match=r"auth\.weights\.acme"):
        validate(Settings, {**MODEL, "auth": {"enabled": True, "weights": {"acme": weight}}}, "s.yaml")


@pytest.mark.parametrize(
    ("auth", "said"),
    [
        ({"oidc": [{"issuer": "i", "audience": "a", "jwks_url": "https://i/"}]}, r"oidc: is not asked for without"),
        ({"enabled": True, "keys": False}, r"keys: false is not allowed without 'oidc'"),
    ],
    ids=["not-enabled", "nobody"],
)
def test_it_is_not_without_effect(auth: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        validate(Settings, {**MODEL, "auth": auth}, "s.yaml")
