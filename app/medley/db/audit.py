"""The audit log: who changed what by hand. Written in the transaction of the change; nobody can rewrite it.

Jobs by themselves are not listed here: each is a row itself. Details never hold a prompt or a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row, text


@dataclass(frozen=True)
class Actor:
    """Who does it: a tenant's key over HTTP, or (None) an operator at the database."""

    key_id: str | None = None
    request_id: str | None = None
    client_address: str | None = None


OPERATOR = Actor()


def record(
    conn: Connection, tenant: UUID, actor: Actor, action: str, object_: str, details: Mapping[str, object] | None = None
) -> None:
    """Adds one row: `action` is `noun.verb`, `object_` the public id or name of what was changed."""
    conn.execute(
        text(
            "INSERT INTO audit_log (tenant_id, key_id, action, object, details, request_id, client_address) VALUES"
            " (:tenant, :key, :action, :object, CAST(:details AS jsonb), :request, :client)"
        ),
        {
            "tenant": tenant,
            "key": actor.key_id,
            "action": action,
            "object": object_,
            "details": msgspec.json.encode(details or {}).decode(),
            "request": actor.request_id,
            "client": actor.client_address,
        },
    )


def read_audit(
    conn: Connection, tenant: UUID | None, *, before: int | None = None, limit: int = 100
) -> Sequence[Row[Any]]:
    """Rows of a tenant (None: of all that the caller may see), newest first, numbered below `before`."""
    statement = text(
        "SELECT a.*, t.name AS tenant FROM audit_log a LEFT JOIN tenants t ON t.id = a.tenant_id"
        " WHERE (CAST(:tenant AS uuid) IS NULL OR a.tenant_id = :tenant)"
        " AND (CAST(:before AS bigint) IS NULL OR a.id < :before) ORDER BY a.id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"tenant": tenant, "before": before, "limit": limit}).all()
