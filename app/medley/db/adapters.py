"""Adapters and their revisions: what a tenant owns and may name. What others share with it stands in `grants`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.spec.ids import uuid7

FILES_LOCK = 0x66696C6573  # an advisory lock: a backup holds it shared, so that no file goes meanwhile
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class NewRevision:
    digest: str  # SHA-256 over both files: the store's address
    max_rank: int
    num_tiles: int
    size_bytes: int


def add_revision(conn: Connection, tenant: UUID, name: str, new: NewRevision) -> tuple[UUID, bool]:
    """Makes `new` the newest revision of adapter `name`. Returns (revision id, whether it is new).

    The same files again are the same revision, and again what the name means. A deleted adapter lives again.
    The caller holds the digest (`hold_digest`) and has seen that its files are there.
    """
    adapter = conn.execute(
        text(
            "INSERT INTO adapters (id, tenant_id, name) VALUES (:id, :tenant, :name)"
            " ON CONFLICT (tenant_id, name) DO UPDATE SET deleted_at = NULL RETURNING id"
        ),
        {"id": uuid7(), "tenant": tenant, "name": name},
    ).scalar_one()
    inserted = conn.execute(
        text(
            "INSERT INTO adapter_revisions (id, tenant_id, adapter_id, digest, max_rank, num_tiles, size_bytes)"
            " VALUES (:id, :tenant, :adapter, :digest, :max_rank, :num_tiles, :size_bytes)"
            " ON CONFLICT (adapter_id, digest) DO NOTHING RETURNING id"
        ),
        {
            "id": uuid7(),
            "tenant": tenant,
            "adapter": adapter,
            "digest": new.digest,
            "max_rank": new.max_rank,
            "num_tiles": new.num_tiles,
            "size_bytes": new.size_bytes,
        },
    ).scalar_one_or_none()
    if inserted is not None:
        return inserted, True
    existing: UUID = conn.execute(
        text(
            "UPDATE adapter_revisions SET uploaded_at = clock_timestamp(), forgotten_at = NULL"
            " WHERE adapter_id = :adapter AND digest = :digest RETURNING id"
        ),
        {"adapter": adapter, "digest": new.digest},
    ).scalar_one()
    return existing, False


def is_digest_used(conn: Connection, digest: str) -> bool:
    """Whether any tenant has a revision of these files. Runs as `medley_work`, or as the owner."""
    statement = text("SELECT EXISTS (SELECT FROM adapter_revisions WHERE digest = :digest)")
    is_used: bool = conn.execute(statement, {"digest": digest}).scalar_one()
    return is_used


# The newest revision, that is the last uploaded, is the one an adapter's bare name means.
_LIST = (
    "SELECT a.id, a.name, a.created_at, r.id AS revision_id, r.digest, r.max_rank, r.num_tiles, r.size_bytes,"
    " r.created_at AS revised_at, r.quarantined_at,"
    " (SELECT count(*) FROM adapter_revisions n WHERE n.adapter_id = a.id AND n.forgotten_at IS NULL) AS num_revisions"
    " FROM adapters a CROSS JOIN LATERAL ("
    "  SELECT * FROM adapter_revisions r WHERE r.adapter_id = a.id AND r.forgotten_at IS NULL"
    "  ORDER BY r.uploaded_at DESC, r.id DESC LIMIT 1) r"
    " WHERE a.tenant_id = (SELECT medley_tenant()) AND a.deleted_at IS NULL"
)


def list_adapters(conn: Connection, *, after: str | None = None, limit: int = 10_000) -> Sequence[Row[Any]]:
    """The caller's adapters by name, each with its newest revision."""
    statement = _LIST + " AND a.name > :after ORDER BY a.name LIMIT :limit"
    return conn.execute(text(statement), {"after": after or "", "limit": limit}).all()


def read_adapter(conn: Connection, name: str) -> Row[Any] | None:
    return conn.execute(text(_LIST + " AND a.name = :name"), {"name": name}).one_or_none()


def read_revisions(conn: Connection, adapter: UUID) -> Sequence[Row[Any]]:
    """Every revision of an adapter of the caller's, newest first."""
    statement = (
        "SELECT * FROM adapter_revisions WHERE adapter_id = :adapter AND tenant_id = (SELECT medley_tenant())"
        " AND forgotten_at IS NULL ORDER BY id DESC"
    )
    return conn.execute(text(statement), {"adapter": adapter}).all()


def list_revisions(conn: Connection) -> Sequence[Row[Any]]:
    """(name, revision_id, revised_at, quarantined_at) of every revision of the caller's, the newest of each adapter
    first.
    """
    statement = (
        "SELECT a.name, r.id AS revision_id, r.created_at AS revised_at, r.quarantined_at FROM adapters a"
        " JOIN adapter_revisions r ON r.adapter_id = a.id AND r.forgotten_at IS NULL"
        " WHERE a.tenant_id = (SELECT medley_tenant()) AND a.deleted_at IS NULL"
        " ORDER BY a.name, r.uploaded_at DESC, r.id DESC"
    )
    return conn.execute(text(statement)).all()


def read_made_at(conn: Connection, revision: UUID) -> datetime | None:
    """When a revision that the caller may use was made; None where there is none."""
    statement = text("SELECT created_at FROM adapter_revisions WHERE id = :id")
    made_at: datetime | None = conn.execute(statement, {"id": revision}).scalar_one_or_none()
    return made_at


def resolve(conn: Connection, names: Sequence[str]) -> dict[str, Row[Any]]:
    """The newest revision of each adapter in `names` that the caller has; unknown names are left out."""
    statement = _LIST + " AND a.name = ANY(:names)"
    return {row.name: row for row in conn.execute(text(statement), {"names": list(names)})}


def read_gone(conn: Connection, revisions: Sequence[UUID]) -> list[UUID]:
    """Those of `revisions` that are no more."""
    rows = conn.exec_driver_sql(
        "SELECT r.id FROM unnest(%(ids)b::uuid[]) AS r(id)"
        " WHERE NOT EXISTS (SELECT FROM adapter_revisions a WHERE a.id = r.id)",
        {"ids": list(revisions)},
    )
    return list(rows.scalars())


def delete_adapter(conn: Connection, name: str) -> bool:
    """Hides the adapter from new jobs and ends its grants; the owner's jobs that name it already run to their end.

    Then its files go.
    """
    row = conn.execute(
        text(
            "UPDATE adapters SET deleted_at = clock_timestamp() WHERE name = :name AND deleted_at IS NULL"
            " AND tenant_id = (SELECT medley_tenant()) RETURNING id"
        ),
        {"name": name},
    ).one_or_none()
    if row is None:
        return False
    conn.execute(
        text("UPDATE adapter_grants SET revoked_at = clock_timestamp() WHERE adapter_id = :id AND revoked_at IS NULL"),
        {"id": row.id},
    )
    return True


def await_backups(conn: Connection) -> None:
    """Waits for backups, which copy objects of rows that they have read before; none begins in this transaction."""
    conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": FILES_LOCK})


def hold_digest(conn: Connection, digest: str, *, exclusive: bool = False) -> None:
    """For the rest of this transaction the files of `digest` are not deleted; exclusive: nobody else relies on them.

    So who writes a row that names files, and finds them there, finds them there later. Who deletes waits for backups
    too.
    """
    if exclusive:
        await_backups(conn)
    function = "pg_advisory_xact_lock" if exclusive else "pg_advisory_xact_lock_shared"
    conn.execute(text(f"SELECT {function}(hashtextextended(:digest, 0))"), {"digest": digest})


# Jobs that wait, run or are held, and cells and lines that are to become jobs. `d` is what is asked about.
_IN_USE = (
    "EXISTS (SELECT FROM demand WHERE revision_id = d.id AND num_queued > 0)"
    " OR EXISTS (SELECT FROM jobs j WHERE j.state = 'leased' AND j.revision_id = d.id)"
    " OR EXISTS (SELECT FROM batches b JOIN job_inputs i ON i.batch_id = b.id JOIN jobs j ON j.id = i.job_id"
    "  WHERE b.paused_at IS NOT NULL AND b.finished_at IS NULL AND j.revision_id = d.id AND j.state = 'queued')"
    " OR EXISTS (SELECT FROM sweep_columns c JOIN sweeps s ON s.id = c.sweep_id"
    "  WHERE s.expand_due_at IS NOT NULL AND c.revision_id = d.id)"
    " OR EXISTS (SELECT FROM openai_batch_models m JOIN openai_batches o ON o.id = m.batch_id"
    "  WHERE o.next_offset IS NOT NULL AND m.revision_id = d.id)"
)
# A request that found the adapter before it was deleted may commit jobs until the longest statement's end.
_DEAD = (
    "SELECT d.id, d.digest FROM adapter_revisions d JOIN adapters a ON a.id = d.adapter_id"
    " WHERE a.deleted_at < clock_timestamp() - interval '15 minutes' AND d.forgotten_at IS NULL"
    f" AND NOT ({_IN_USE})"
)


def read_dead_digests(conn: Connection, limit: int) -> list[str]:
    """Digests of revisions of deleted adapters that nothing uses any more. For who sees every tenant's rows."""
    return list(conn.execute(text(f"SELECT DISTINCT digest FROM ({_DEAD} LIMIT :limit) d"), {"limit": limit}).scalars())


def forget_digest(conn: Connection, digest: str) -> bool:
    """Notes that the dead revisions of `digest` have no files. Returns whether its files are to be deleted now.

    They are not where another revision, anybody's, has the same files. Until the commit nobody can come to rely on
    them, so delete them before it.
    """
    hold_digest(conn, digest, exclusive=True)
    dead = conn.execute(text(_DEAD + " AND d.digest = :digest"), {"digest": digest}).all()
    if not dead:
        return False
    conn.execute(
        text("UPDATE adapter_revisions SET forgotten_at = clock_timestamp() WHERE id = ANY(:ids)"),
        {"ids": [row.id for row in dead]},
    )
    statement = text("SELECT EXISTS (SELECT FROM adapter_revisions WHERE digest = :digest AND forgotten_at IS NULL)")
    return not conn.execute(statement, {"digest": digest}).scalar_one()


def read_unknown_digests(conn: Connection, digests: Sequence[str]) -> set[str]:
    """Those of `digests` that no revision has, anybody's. For who sees every tenant's rows."""
    known = conn.exec_driver_sql(
        "SELECT digest FROM adapter_revisions WHERE digest = ANY(%(digests)b::text[]) AND forgotten_at IS NULL",
        {"digests": list(digests)},
    ).scalars()
    return set(digests) - set(known)


def read_sizes(conn: Connection, revisions: Iterable[UUID]) -> Sequence[Row[Any]]:
    """(id, tenant_id, digest, num_tiles, size_bytes) of each revision. As `medley_work`: of any tenant."""
    return conn.execute(
        text("SELECT id, tenant_id, digest, num_tiles, size_bytes FROM adapter_revisions WHERE id = ANY(:revisions)"),
        {"revisions": list(revisions)},
    ).all()
