"""Tenants, as the operator makes them and as a request carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.config import Quotas
from medley.db.batches import TenantClosing
from medley.db.keys import NewKey, add_key, note_use, present
from medley.db.quotas import with_overrides
from medley.spec.ids import uuid7


@dataclass(frozen=True)
class Tenant:
    """Who calls, by which key, and how much he may have."""

    id: UUID
    name: str
    key_id: str
    quotas: Quotas = field(default_factory=Quotas)


@dataclass(frozen=True)
class Access:
    """What a presented key opens. `expires_in_s`: seconds it still lives on the database's clock; None: no end."""

    tenant: Tenant
    scopes: frozenset[str]
    expires_in_s: float | None


def authenticate(conn: Connection, key: str, quotas: Quotas) -> Access | None:
    """What the key opens, or None. `quotas` holds where the tenant has no limits of its own.

    Runs as `medley_api`, inside a transaction that it gives the tenant's rights. Notes the use now and then.
    """
    row = present(conn, key)
    if row is None:
        return None
    conn.execute(text("SELECT set_config('medley.tenant', :tenant, true)"), {"tenant": str(row.tenant_id)})
    tenant = conn.execute(
        text(
            "SELECT t.name, l.* FROM tenants t LEFT JOIN tenant_limits l ON l.tenant_id = t.id"
            " WHERE t.id = :id AND t.delete_requested_at IS NULL"
        ),
        {"id": row.tenant_id},
    ).one_or_none()
    if tenant is None:
        return None
    if row.is_use_due:
        note_use(conn, row.id)
    holder = Tenant(row.tenant_id, tenant.name, row.id, with_overrides(quotas, tenant))
    return Access(holder, frozenset(row.scopes), row.expires_in_s)


def add_tenant(conn: Connection, name: str, *, weight: float = 1.0) -> str:
    """Makes the tenant where it is new and a further key of every scope for it. Returns the key, which is not stored.

    Raises IntegrityError for a name that is none, TenantClosing.
    """
    key = NewKey.draw()
    add_key(conn, ensure_tenant(conn, name, weight=weight)[0], key)
    return key.text


def ensure_tenant(conn: Connection, name: str, *, weight: float = 1.0) -> tuple[UUID, bool]:
    """(the tenant of that name, whether it is new). Raises IntegrityError for a name that is none, TenantClosing."""
    inserted = conn.execute(
        text(
            "INSERT INTO tenants (id, name, weight) VALUES (:id, :name, :weight) ON CONFLICT (name) DO NOTHING"
            " RETURNING id"
        ),
        {"id": uuid7(), "name": name, "weight": weight},
    ).scalar_one_or_none()
    if inserted is not None:
        return inserted, True
    statement = "SELECT id, delete_requested_at IS NOT NULL AS is_closing FROM tenants WHERE name = :name"
    existing = conn.execute(text(statement), {"name": name}).one()
    if existing.is_closing:
        raise TenantClosing(name)
    return existing.id, False


def read_name(conn: Connection, tenant: UUID) -> str:
    name: str = conn.execute(text("SELECT name FROM tenants WHERE id = :id"), {"id": tenant}).scalar_one()
    return name


def find_tenant(conn: Connection, name: str) -> UUID | None:
    found: UUID | None = conn.execute(text("SELECT id FROM tenants WHERE name = :name"), {"name": name}).scalar()
    return found


def list_tenants(conn: Connection) -> Sequence[Row[Any]]:
    """Every tenant with its weight, what it has in the queue and the limits of its own, by name. For the operator."""
    return conn.execute(
        text(
            "SELECT t.name, t.weight, t.created_at, coalesce(u.queued_jobs, 0) AS used_jobs,"
            " coalesce(u.queued_bytes, 0) AS used_bytes,"
            " l.queued_jobs, l.queued_bytes, l.adapters, l.storage_bytes, l.requests_per_s"
            " FROM tenants t LEFT JOIN tenant_usage u ON u.tenant_id = t.id"
            " LEFT JOIN tenant_limits l ON l.tenant_id = t.id ORDER BY t.name"
        )
    ).all()
