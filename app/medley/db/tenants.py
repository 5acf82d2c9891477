"""Tenants and their API keys.

A key is `mk_<8 hex digits>_<43 characters>`: the first part names the row, the second is random and stored as its
SHA-256 alone (a fast hash is right for a random secret).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from medley.spec.ids import uuid7

_KEY = re.compile(r"mk_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Tenant:
    id: UUID
    name: str
    key_id: str


def add_tenant(conn: Connection, name: str, *, weight: float = 1.0) -> str:
    """Makes the tenant where it is new and a further key for it. Returns the key, which is not stored."""
    conn.execute(
        text("INSERT INTO tenants (id, name, weight) VALUES (:id, :name, :weight) ON CONFLICT (name) DO NOTHING"),
        {"id": uuid7(), "name": name, "weight": weight},
    )
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    conn.execute(
        text(
            "INSERT INTO api_keys (id, tenant_id, secret_sha256)"
            " SELECT :id, t.id, :digest FROM tenants t WHERE t.name = :name"
        ),
        {"id": key_id, "digest": _digest(secret), "name": name},
    )
    return f"mk_{key_id}_{secret}"


def authenticate(conn: Connection, key: str) -> Tenant | None:
    """The key's tenant, or None. Runs as `medley_api`, inside a transaction that it gives the tenant's rights."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    key_id, secret = match.groups()
    conn.execute(text("SELECT set_config('medley.key', :key, true)"), {"key": key_id})
    row = conn.execute(
        text(
            "SELECT tenant_id, secret_sha256 FROM api_keys WHERE id = :id AND revoked_at IS NULL"
            " AND (expires_at IS NULL OR expires_at > clock_timestamp())"
        ),
        {"id": key_id},
    ).one_or_none()
    if row is None or not hmac.compare_digest(bytes(row.secret_sha256), _digest(secret)):
        return None
    conn.execute(text("SELECT set_config('medley.tenant', :tenant, true)"), {"tenant": str(row.tenant_id)})
    name: str = conn.execute(text("SELECT name FROM tenants WHERE id = :id"), {"id": row.tenant_id}).scalar_one()
    return Tenant(row.tenant_id, name, key_id)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
