"""Idempotency keys: the same key with the same request makes one thing, however often it is sent."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text


class KeyConflict(Exception):
    """The key was used with another request."""


def claim_key(conn: Connection, tenant: UUID, key: str, request_sha256: bytes, resource: UUID) -> UUID | None:
    """Binds `key` to `resource` in this transaction; waits for another transaction that is binding it.

    Returns None where the key was free (go on and create), else the resource it already made.
    Raises KeyConflict where it was used with a different request.
    """
    inserted = conn.execute(
        text(
            "INSERT INTO idempotency_keys (tenant_id, key, request_sha256, resource_id)"
            " VALUES (:tenant, :key, :digest, :resource) ON CONFLICT DO NOTHING RETURNING key"
        ),
        {"tenant": tenant, "key": key, "digest": request_sha256, "resource": resource},
    ).one_or_none()
    if inserted is not None:
        return None
    row = conn.execute(
        text("SELECT request_sha256, resource_id FROM idempotency_keys WHERE tenant_id = :tenant AND key = :key"),
        {"tenant": tenant, "key": key},
    ).one()
    if bytes(row.request_sha256) != request_sha256:
        raise KeyConflict(key)
    existing: UUID = row.resource_id
    return existing


def forget_keys(conn: Connection, *, older_than_s: float, limit: int = 10_000) -> int:
    """Deletes keys older than this. Returns how many."""
    return conn.execute(
        text(
            "DELETE FROM idempotency_keys WHERE (tenant_id, key) IN (SELECT tenant_id, key FROM idempotency_keys"
            " WHERE created_at < statement_timestamp() - make_interval(secs => :age) LIMIT :limit)"
        ),
        {"age": older_than_s, "limit": limit},
    ).rowcount
