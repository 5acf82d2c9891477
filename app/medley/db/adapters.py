"""Adapters and their revisions: what a tenant owns and may name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.spec.ids import uuid7

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
            "UPDATE adapter_revisions SET uploaded_at = clock_timestamp()"
            " WHERE adapter_id = :adapter AND digest = :digest RETURNING id"
        ),
        {"adapter": adapter, "digest": new.digest},
    ).scalar_one()
    return existing, False


# The newest revision, that is the last uploaded, is the one an adapter's bare name means.
_LIST = (
    "SELECT a.id, a.name, a.created_at, r.id AS revision_id, r.digest, r.max_rank, r.num_tiles, r.size_bytes,"
    " r.created_at AS revised_at, r.quarantined_at,"
    " (SELECT count(*) FROM adapter_revisions n WHERE n.adapter_id = a.id) AS num_revisions"
    " FROM adapters a CROSS JOIN LATERAL ("
    "  SELECT * FROM adapter_revisions r WHERE r.adapter_id = a.id ORDER BY r.uploaded_at DESC, r.id DESC LIMIT 1) r"
    " WHERE a.deleted_at IS NULL"
)


def list_adapters(conn: Connection, *, after: str | None = None, limit: int = 10_000) -> Sequence[Row[Any]]:
    """The caller's adapters by name, each with its newest revision."""
    statement = _LIST + " AND a.name > :after ORDER BY a.name LIMIT :limit"
    return conn.execute(text(statement), {"after": after or "", "limit": limit}).all()


def read_adapter(conn: Connection, name: str) -> Row[Any] | None:
    return conn.execute(text(_LIST + " AND a.name = :name"), {"name": name}).one_or_none()


def read_revisions(conn: Connection, adapter: UUID) -> Sequence[Row[Any]]:
    """Every revision of an adapter, newest first."""
    statement = "SELECT * FROM adapter_revisions WHERE adapter_id = :adapter ORDER BY id DESC"
    return conn.execute(text(statement), {"adapter": adapter}).all()


def resolve(conn: Connection, names: Sequence[str]) -> dict[str, Row[Any]]:
    """The newest revision of each adapter in `names` that the caller has; unknown names are left out."""
    statement = _LIST + " AND a.name = ANY(:names)"
    return {row.name: row for row in conn.execute(text(statement), {"names": list(names)})}


def delete_adapter(conn: Connection, name: str) -> bool:
    """Hides the adapter from new jobs; jobs that name a revision already run to their end."""
    row = conn.execute(
        text(
            "UPDATE adapters SET deleted_at = clock_timestamp() WHERE name = :name AND deleted_at IS NULL RETURNING id"
        ),
        {"name": name},
    ).one_or_none()
    return row is not None
