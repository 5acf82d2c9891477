"""Alembic's environment: runs the versions on the connection that `medley.db.migrate` opened."""

from __future__ import annotations

from alembic import context

from medley.db.models import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
