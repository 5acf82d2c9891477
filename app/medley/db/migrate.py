"""Brings a database to the newest schema (as `medley_owner`), and says which one it has."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

SCRIPTS = Path(__file__).resolve().parents[3] / "migrations"
MIGRATION_LOCK = 0x6D65646C6579  # an advisory lock, so that two deployers do not migrate at once


def upgrade(url: str, revision: str = "head") -> None:
    """Runs the versions up to `revision` in one transaction; waits for another migrator to end."""
    _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> None:
    _run(url, lambda config: command.downgrade(config, revision))


def head() -> str | None:
    """The newest version in the source tree."""
    return ScriptDirectory(str(SCRIPTS)).get_current_head()


def known_versions() -> set[str]:
    """All versions in the source tree."""
    return {script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions()}


def is_current(connection: Connection) -> bool:
    """Whether the database has the newest version."""
    return MigrationContext.configure(connection).get_current_revision() == head()


def _run(url: str, act: object) -> None:
    assert callable(act)
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '30s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            act(config)
    finally:
        engine.dispose()
