"""What the database of keys holds. A change here needs a migration (``migrations/versions``); a test compares."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Integer, LargeBinary, MetaData, String, Table
from sqlalchemy import UniqueConstraint as Unique

metadata = MetaData()
# SQLite counts by itself in INTEGER columns only.
_COUNTED = BigInteger().with_variant(Integer, "sqlite")
NAME = String(63)
# As people write it: any text.
TITLE = String(255)

# Times are in seconds since the epoch.
projects = Table(
    "projects",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", NAME, nullable=False),
    Column("name", NAME, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    # Null: as its name.
    Column("title", TITLE),
    # Of archived ones too: what belongs to a project is marked with its name.
    Unique("tenant", "name", name="one_project_of_a_name"),
)
# Owners of keys of a project, as OpenAI's admin API has them.
service_accounts = Table(
    "service_accounts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), ForeignKey("projects.id"), nullable=False),
    Column("title", TITLE, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), ForeignKey("projects.id"), nullable=False),
    Column("name", NAME, nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    # A list; null is all.
    Column("models", JSON(none_as_null=True)),
    Column("scopes", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("title", TITLE),
    # Null: nobody's but the project's. SQLite can't add a foreign key to a table that is there.
    Column("account_id", String(40)),
    # Null: it is a key. Else a name of a client's certificate, whose digest is in the place of a key's.
    Column("certificate", TITLE),
)
# Who changed what; never a key, nor its digest.
audit = Table(
    "audit",
    metadata,
    Column("id", _COUNTED, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(40), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", JSON, nullable=False),
)
# One row, which counts the changes: who has seen this number has seen them all.
changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)
# One for each of whom a limit is, with or without a model; what is null is not limited.
limits = Table(
    "limits",
    metadata,
    # As ``Limit.subject`` writes whose it is.
    Column("subject", String(400), primary_key=True),
    Column("tenant", NAME, nullable=False),
    Column("project", NAME),
    Column("key_id", String(40)),
    Column("model", String(200)),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("concurrent_requests", BigInteger),
    # In billionths of the currency.
    Column("budget_per_month", BigInteger),
    Column("changed_at", BigInteger, nullable=False),
)
# What has been used of limits by day and by month.
spent = Table(
    "spent",
    metadata,
    Column("subject", String(400), primary_key=True),
    Column("kind", String(40), primary_key=True),
    # ``2026-11-30`` or ``2026-11``, UTC.
    Column("period", String(10), primary_key=True),
    Column("amount", BigInteger, nullable=False),
)
