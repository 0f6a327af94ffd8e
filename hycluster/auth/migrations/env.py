"""What alembic runs for every command; the connection is its caller's, who commits."""

from __future__ import annotations

from alembic import context

from hycluster.auth.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
