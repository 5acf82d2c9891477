"""Grants: which adapters a tenant lets another use, what the grantee sees of them, and the end of what waits.

A grant is of an adapter, of all its revisions or one. The grantee names the adapter `owner/name`; it reads the rows
that were granted and no others of the owner, which row-level security holds as these statements do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.ends import End, end_unclaimed
from medley.spec.ids import uuid7

END_LIMIT = 5_000  # jobs that one transaction ends

_GRANT = (
    "SELECT g.id, g.grantee, g.revision_id, g.created_at, a.name FROM adapter_grants g"
    " JOIN adapters a ON a.id = g.adapter_id"
    " WHERE g.tenant_id = (SELECT medley_tenant()) AND g.revoked_at IS NULL"
)


def add_grant(conn: Connection, owner: UUID, adapter: UUID, revision: UUID | None, grantee: str) -> tuple[UUID, bool]:
    """Lets the tenant named `grantee` use the adapter. Returns (grant id, whether it is new).

    revision: None for all of them. Raises IntegrityError for a name that no tenant has.
    """
    parameters = {"id": uuid7(), "owner": owner, "adapter": adapter, "revision": revision, "grantee": grantee}
    # The tenant's own row alone is seen here, which gives the name.
    made = conn.execute(
        text(
            "INSERT INTO adapter_grants (id, tenant_id, owner, adapter_id, revision_id, grantee)"
            " SELECT :id, t.id, t.name, :adapter, :revision, :grantee FROM tenants t WHERE t.id = :owner"
            " ON CONFLICT DO NOTHING RETURNING id"
        ),
        parameters,
    ).scalar_one_or_none()
    if made is not None:
        return made, True
    existing: UUID = conn.execute(
        text(
            "SELECT id FROM adapter_grants WHERE adapter_id = :adapter AND tenant_id = :owner AND grantee = :grantee"
            " AND revision_id IS NOT DISTINCT FROM CAST(:revision AS uuid) AND revoked_at IS NULL"
        ),
        parameters,
    ).scalar_one()
    return existing, False


def list_grants(conn: Connection, adapter: UUID) -> Sequence[Row[Any]]:
    """The live grants of an adapter of the caller's, the oldest first."""
    return conn.execute(text(_GRANT + " AND g.adapter_id = :adapter ORDER BY g.id"), {"adapter": adapter}).all()


def read_grant(conn: Connection, grant: UUID) -> Row[Any] | None:
    return conn.execute(text(_GRANT + " AND g.id = :id"), {"id": grant}).one_or_none()


def revoke_grants(conn: Connection, adapter: UUID, grantee: str, revision: UUID | None) -> int:
    """Ends the grants of the caller's adapter to a tenant, all of them or that of one revision. Returns how many.

    From the commit on no new job can name the adapter; what waits is ended by `end_revoked`, what runs ends by itself.
    """
    return conn.execute(
        text(
            "UPDATE adapter_grants SET revoked_at = clock_timestamp() WHERE adapter_id = :adapter"
            " AND tenant_id = (SELECT medley_tenant()) AND grantee = :grantee AND revoked_at IS NULL"
            " AND (CAST(:revision AS uuid) IS NULL OR revision_id = :revision)"
        ),
        {"adapter": adapter, "grantee": grantee, "revision": revision},
    ).rowcount


# Every granted revision, the newest (the last uploaded) of an adapter first.
_SHARED = (
    "SELECT DISTINCT g.owner, a.name, a.created_at, r.id AS revision_id, r.digest, r.max_rank, r.num_tiles,"
    " r.size_bytes, r.created_at AS revised_at, r.quarantined_at, r.uploaded_at"
    " FROM adapter_grants g JOIN adapters a ON a.id = g.adapter_id AND a.deleted_at IS NULL"
    " JOIN adapter_revisions r ON r.adapter_id = a.id AND r.forgotten_at IS NULL"
    "  AND (g.revision_id IS NULL OR g.revision_id = r.id)"
    " WHERE g.revoked_at IS NULL"
    "  AND g.grantee = (SELECT t.name FROM tenants t WHERE t.id = (SELECT medley_tenant()))"
)
_NEWEST_FIRST = " ORDER BY g.owner, a.name, r.uploaded_at DESC, r.id DESC"


def read_shared(conn: Connection, adapters: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Row[Any]]]:
    """The revisions that the caller may use of others' adapters, given as (owner, name); the newest first.

    What was not granted is left out as what does not exist is.
    """
    found: dict[tuple[str, str], list[Row[Any]]] = {}
    if not adapters:
        return found
    wanted = " AND (g.owner, a.name) IN (SELECT * FROM unnest(CAST(:owners AS text[]), CAST(:names AS text[])))"
    owners, names = zip(*adapters, strict=True)
    rows = conn.execute(text(_SHARED + wanted + _NEWEST_FIRST), {"owners": list(owners), "names": list(names)})
    for row in rows:
        found.setdefault((row.owner, row.name), []).append(row)
    return found


def list_shared_revisions(conn: Connection) -> Sequence[Row[Any]]:
    """Every revision of others' adapters that the caller may use, by owner and name, the newest first."""
    return conn.execute(text(_SHARED + _NEWEST_FIRST)).all()


def list_shared(conn: Connection, *, after: tuple[str, str] = ("", ""), limit: int = 10_000) -> Sequence[Row[Any]]:
    """Others' adapters that the caller may use, by owner and name, each with its newest granted revision."""
    statement = (
        "SELECT s.* FROM (SELECT DISTINCT ON (s.owner, s.name) s.*, count(*) OVER (PARTITION BY s.owner, s.name)"
        f" AS num_revisions FROM ({_SHARED}) s ORDER BY s.owner, s.name, s.uploaded_at DESC, s.revision_id DESC) s"
        " WHERE (s.owner, s.name) > (:owner, :name) ORDER BY s.owner, s.name LIMIT :limit"
    )
    return conn.execute(text(statement), {"owner": after[0], "name": after[1], "limit": limit}).all()


# The lanes of a tenant's own adapters are the revisions themselves, so the others are few.
_REVOKED = text(
    "SELECT q.id, q.batch_id FROM demand d JOIN jobs q ON q.pool = d.pool AND q.lane = d.lane"
    " AND q.priority = d.priority AND q.state = 'queued' AND NOT q.is_held"
    " WHERE d.pool = :pool AND d.num_queued > 0 AND d.lane <> d.revision_id"
    " AND NOT medley_may_use(d.tenant_id, d.revision_id) LIMIT :limit"
)


def end_revoked(conn: Connection, pool: str) -> set[UUID]:
    """Fails up to `END_LIMIT` jobs that wait for adapters which are shared with their tenants no longer.

    Returns their batches; none: nothing is left. Held jobs follow when they are resumed, leased ones run on.
    """
    waiting = conn.execute(_REVOKED, {"pool": pool, "limit": END_LIMIT}).all()
    if end_unclaimed(conn, [row.id for row in waiting], End.revoked()) == 0:
        return set()
    return {row.batch_id for row in waiting}
