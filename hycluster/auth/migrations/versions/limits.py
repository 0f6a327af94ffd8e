"""Limits, and what has been used of those by day and by month."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "limits",
        sa.Column("subject", sa.String(400), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("project", sa.String(63)),
        sa.Column("key_id", sa.String(40)),
        sa.Column("model", sa.String(200)),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("tokens_per_day", sa.BigInteger),
        sa.Column("concurrent_requests", sa.BigInteger),
        sa.Column("budget_per_month", sa.BigInteger),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "spent",
        sa.Column("subject", sa.String(400), primary_key=True),
        sa.Column("kind", sa.String(40), primary_key=True),
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("amount", sa.BigInteger, nullable=False),
    )
