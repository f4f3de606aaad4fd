"""Runs numbered migrations on the connection that the index hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from registry.index import metadata

# The caller holds one IMMEDIATE transaction around check and migration, and alembic does not end a
# transaction that it did not begin.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
)
context.run_migrations()
