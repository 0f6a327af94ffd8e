from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.engine.fairness import (
    MOST_IDLE,
    OUTPUT_COST,
    TenantAccount,
    TenantAccounts,
    fair_shares,
    payer_headers,
    payer_in,
)

BURST = 50.0


@given(
    st.lists(st.tuples(st.floats(0.25, 8), st.integers(1, 400), st.integers(1, 100)), min_size=2, max_size=6),
    st.integers(0, 2**16),
)
def test_tenants_that_always_wait_get_tokens_by_their_weights(tenants: list[tuple[float, int, int]], seed: int) -> None:
    """Whatever the length of their requests: at any time within what a single one of theirs costs, and the burst."""
    chance, accounts = random.Random(seed), TenantAccounts(BURST)
    bills = [accounts.open(str(n), weight, []) for n, (weight, _, _) in enumerate(tenants)]
    largest = max((prompt + OUTPUT_COST * output) / weight for weight, prompt, output in tenants)
    for _ in range(200):
        bill = min(bills, key=lambda each: each.account.turn)
        number = bills.index(bill)
        _, prompt, output = tenants[number]
        prompt = chance.randint(1, prompt)
        accounts.admitted(bill.account)
        bill.admit(prompt, prompt, 0)
        bill.compute(prompt + chance.randint(0, output))
        bills[number] = accounts.open(str(number), tenants[number][0], [each.account for each in bills])
        served = [each.account.served for each in bills]
        assert max(served) - min(served) <= largest + BURST / min(weight for weight, _, _ in tenants) + 1e-6


def test_who_comes_back_has_saved_up_a_burst() -> None:
    accounts = TenantAccounts(BURST)
    busy, idle = accounts.open("busy", 1, []), accounts.open("idle", 2, [])
    for _ in range(100):
        busy.account.charge(100)
    back = accounts.open("idle", 2, [busy.account])
    assert back.account is idle.account
    assert back.account.served == busy.account.served - BURST / 2, "of its weight"
    assert back.account.turn < busy.account.turn
    # Nobody waits: as the last that was let in.
    accounts.admitted(busy.account)
    assert accounts.open("new", 1, []).account.served == busy.account.served - BURST
    # Who has had more than those who wait keeps it.
    assert accounts.open("busy", 1, [back.account]).account.served == busy.account.served


def test_those_of_another_queue_say_nothing_of_who_comes_back() -> None:
    """Else whoever was away while bulk work waits would have all that the others have had, before any of them."""
    online, bulk = TenantAccounts(BURST), TenantAccounts(BURST)
    busy = online.open("busy", 1, [])
    busy.account.charge(10_000)
    batch = bulk.open("batch", 1, [busy.account])
    assert batch.account.served == 0
    assert online.open("new", 1, [busy.account, batch.account]).account.served == busy.account.served - BURST
    # Of the same tenant's too.
    bulk.open("busy", 1, [])
    assert bulk.open("other", 1, [busy.account]).account.served == 0


def test_what_is_computed_again_or_cached_costs_nothing() -> None:
    bill = TenantAccounts().open("a", 2, [])
    bill.admit(prompt=100, tokens=100, cached=60)
    assert bill.account.served == 40 / 2
    for until in (101, 102, 103):
        bill.compute(until)
    assert bill.account.served == (40 + 3 * OUTPUT_COST) / 2
    # Preempted, and computed again without a cache.
    bill.admit(prompt=100, tokens=103, cached=0)
    bill.compute(103)
    assert bill.account.served == (40 + 3 * OUTPUT_COST) / 2
    bill.compute(104)
    assert bill.account.served == (40 + 4 * OUTPUT_COST) / 2
    bill.account.pass_time(0)
    recent = bill.account.recent
    bill.account.pass_time(1e6)
    assert bill.account.recent < 1e-6 < recent


@given(
    st.lists(st.tuples(st.floats(0.25, 8), st.floats(0, 100)), min_size=1, max_size=8),
    st.floats(1, 100),
)
def test_shares(wanted: list[tuple[float, float]], whole: float) -> None:
    accounts = {TenantAccount(str(n), weight): wants for n, (weight, wants) in enumerate(wanted)}
    shares = fair_shares(accounts, whole)
    assert shares.keys() == accounts.keys()
    short = [account for account in accounts if shares[account] < accounts[account] - 1e-9]
    assert all(shares[account] <= accounts[account] for account in accounts)
    assert all(shares[account] >= min(1, accounts[account]) for account in accounts), "so far there is one for each"
    if all(shares[account] > 1 for account in short):
        levels = [shares[account] / account.weight for account in short]
        assert not levels or max(levels) == pytest.approx(min(levels)), "by weight, who does not get all"
        assert all(
            shares[account] / account.weight <= max(levels, default=0) * (1 + 1e-9)
            for account in accounts
            if account not in short and levels and shares[account] > 1
        )


@pytest.mark.parametrize("light", [0.001, 1e-17, 1e-300])
def test_shares_of_weights_that_are_far_apart(light: float) -> None:
    heavy, other = TenantAccount("heavy", 1000), TenantAccount("light", light)
    shares = fair_shares({heavy: 50, other: 50}, 40)
    assert shares[heavy] == pytest.approx(40)
    assert shares[other] == 1


def test_few_are_remembered() -> None:
    accounts = TenantAccounts()
    for number in range(3 * MOST_IDLE):
        bill = accounts.open(str(number), 1, [])
        bill.account.charge(number)
        accounts.keep([bill.account])
        assert len(accounts) <= MOST_IDLE + 1
    assert accounts.open(str(3 * MOST_IDLE - 1), 1, []).account.served == 3 * MOST_IDLE - 1


def test_whose_it_is_goes_along() -> None:
    assert payer_in({"traceparent": "00-1", **payer_headers("acme", 0.1)}) == ("acme", 0.1)
    assert payer_in({"traceparent": "00-1"}) is payer_in(None) is None
