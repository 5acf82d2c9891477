"""What a backup and a restore need of the database: a snapshot that is whole, roles, and a fence against the past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, create_engine, text

from medley.db.adapters import FILES_LOCK

ROLES = ("medley_api", "medley_work")


class NotDumpable(Exception):
    """A dump as the owner would leave rows out."""


@dataclass(frozen=True)
class Snapshot:
    """`id`: for pg_dump --snapshot. `schema`: Alembic's version. `digests`: of all revisions, in order."""

    id: str
    schema: str
    postgres: str
    digests: list[str]


# With row-level security forced, pg_dump --enable-row-security as the owner takes what policies show it, and says
# nothing of the rest.
_HIDDEN = text(
    "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relrowsecurity AND NOT EXISTS (SELECT FROM pg_policy p"
    " WHERE p.polrelid = c.oid AND p.polcmd IN ('*', 'r') AND p.polpermissive"
    "  AND (SELECT oid FROM pg_roles WHERE rolname = current_user) = ANY(p.polroles)"
    "  AND pg_get_expr(p.polqual, p.polrelid) = 'true') ORDER BY 1"
)


def hidden_tables(conn: Connection) -> list[str]:
    """The tables, partitions too, of which the connection's role does not see every row by a policy of its own."""
    return list(conn.execute(_HIDDEN).scalars())


@contextmanager
def snapshot(url: str) -> Iterator[Snapshot]:
    """One moment of the database, as `medley_owner`; while the block lasts, no file of a revision is deleted.

    Raises NotDumpable.
    """
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    try:
        with engine.begin() as conn:
            # The lock first: a file that goes before it goes before the snapshot too.
            conn.execute(text("SELECT pg_advisory_lock_shared(:key)"), {"key": FILES_LOCK})
            conn.commit()
        with engine.begin() as conn:
            yield _take(conn)
    finally:
        engine.dispose()  # and the lock ends with its session


def _take(conn: Connection) -> Snapshot:
    if hidden := hidden_tables(conn):
        raise NotDumpable(
            f"{', '.join(hidden)}: got no policy that shows medley_owner every row, wanted one: a dump would be partial"
        )
    row = conn.execute(
        text(
            "SELECT pg_export_snapshot() AS id, current_setting('server_version') AS postgres,"
            " (SELECT version_num FROM alembic_version) AS schema,"
            " ARRAY(SELECT DISTINCT digest FROM adapter_revisions ORDER BY digest) AS digests"
        )
    ).one()
    return Snapshot(row.id, row.schema, row.postgres, list(row.digests))


def create_roles(url: str) -> None:
    """The roles that a dump grants to and does not hold, where the server has them not. Without passwords."""
    engine = create_engine(url)
    try:
        with engine.begin() as conn:
            there = set(conn.execute(text("SELECT rolname FROM pg_roles")).scalars())
            for role in ROLES:
                if role not in there:
                    conn.execute(text(f"CREATE ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE"))
    finally:
        engine.dispose()


def fence(url: str) -> int:
    """Ends every worker and every term that the database knows, as `medley_owner`. Returns how many workers that were.

    After a restore: a worker or a leader of before may still run somewhere. Whatever it writes from now on is fenced;
    the next leader puts the jobs back that such workers held.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as conn:
            conn.execute(text("UPDATE leaders SET term = term + 1, until = clock_timestamp()"))
            return conn.execute(
                text(
                    "UPDATE workers SET state = 'gone', desired_state = 'gone', lease_until = clock_timestamp(),"
                    " changed_at = clock_timestamp() WHERE state <> 'gone'"
                )
            ).rowcount
    finally:
        engine.dispose()
