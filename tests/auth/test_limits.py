from __future__ import annotations

import pytest
from sqlalchemy import Engine

from hycluster.auth.caller import Caller
from hycluster.auth.keyring import Keyring
from hycluster.auth.limits import Limit
from hycluster.auth.store import KeyStore
from hycluster.settings.auth import Auth

pytestmark = pytest.mark.timeout(120)
ME = Caller("acme", "search", "laptop", key_id="key_1")


@pytest.mark.parametrize(
    ("limit", "concerns"),
    [
        (Limit("acme"), True),
        (Limit("acme", "search"), True),
        (Limit("acme", "search", "key_1"), True),
        (Limit("acme", "search", "key_1", "m"), True),
        (Limit("acme", model="other"), False),
        (Limit("other", "search"), False),
        (Limit("acme", "other"), False),
        (Limit("acme", "search", "key_2"), False),
    ],
    ids=lambda value: value.subject if isinstance(value, Limit) else str(value),
)
def test_whom_a_limit_concerns(limit: Limit, concerns: bool) -> None:
    assert limit.concerns(ME, "m") is concerns


def test_the_keyring_hears_of_them(engine: Engine, settings: Auth, store: KeyStore) -> None:
    with Keyring(engine, settings) as keyring:
        assert not keyring.limits
        limit = Limit("acme", requests_per_minute=3, budget_per_month=10**18)
        store.set_limit(limit)
        keyring.look()
        assert keyring.limits == (limit,)
        known = keyring.limits
        keyring.look()
        assert keyring.limits is known
        store.remove_limit(limit.subject)
        keyring.look()
        assert not keyring.limits


def test_what_is_spent_adds_up(store: KeyStore) -> None:
    one, other = ("tenant:acme", "tokens_per_day", "2026-11-30"), ("tenant:acme", "budget_per_month", "2026-11")
    store.spend({one: 5, other: 7})
    store.spend({one: 5})
    assert store.spent(["2026-11-30", "2026-11"]) == {one: 10, other: 7}
    assert store.spent(["2026-12"]) == {}
