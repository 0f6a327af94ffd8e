"""Entries as tests want them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from hycluster.ledger.entry import Entry

# 2026-03-01 00:00 UTC.
MARCH = 1772323200.0
PLAIN = Entry(
    request_id="r", requests=1, once="", tenant="acme", project="search", key="key_1", key_name="ci", model="m",
    operation="grpc Generate", tier="online", outcome="finished", input_tokens=10, cached_tokens=4, output_tokens=5,
    cost=Decimal("0.25"), started_at=MARCH, ended_at=MARCH + 1,
)  # fmt: skip


def entry(**changes: Any) -> Entry:
    return replace(PLAIN, **changes)
