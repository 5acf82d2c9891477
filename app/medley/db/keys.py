"""API keys: made, presented, rotated, revoked.

A key is `mk_<16 hex digits>_<43 characters>`: the first part names the row and is public, the second is random and
stored as its SHA-256 alone (a fast hash is right for a random secret). Nothing but its end can change of a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from medley.spec.scopes import Scope

ALL_SCOPES = tuple(scope.value for scope in Scope)
USE_NOTED_S = 60.0  # a key's last use is written this often at the most
MAX_LIVE_KEYS = 1_000  # of one tenant

# Keys of before had 8 digits.
_KEY = re.compile(r"mk_([0-9a-f]{8}|[0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{8}|[0-9a-f]{16}")


class TooManyKeys(Exception):
    """The tenant has `MAX_LIVE_KEYS` that live."""


class AlreadyRotated(Exception):
    """The key was rotated, and its successor lives."""


@dataclass(frozen=True)
class NewKey:
    """A key as it is written. `id` is public; `secret` is shown once and never stored."""

    id: str
    secret: str

    @classmethod
    def draw(cls) -> NewKey:
        return cls(secrets.token_hex(8), secrets.token_urlsafe(32))

    @property
    def text(self) -> str:
        """What the caller presents."""
        return f"mk_{self.id}_{self.secret}"


def public_key_id(key_id: str) -> str:
    """The public part of a key as tenants see it."""
    return f"mk_{key_id}"


def parse_key_id(shown: str) -> str | None:
    """The row's id in `mk_<digits>`, or None."""
    digits = shown.removeprefix("mk_")
    return digits if digits != shown and _ID.fullmatch(digits) else None


def present(conn: Connection, key: str) -> Row[Any] | None:
    """The row (id, tenant_id, scopes, expires_in_s, is_use_due) of a key that lives, or None.

    Runs as `medley_api`, which may read this one row before its tenant is known.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    key_id, secret = match.groups()
    conn.execute(text("SELECT set_config('medley.key', :key, true)"), {"key": key_id})
    row = conn.execute(
        text(
            "SELECT id, tenant_id, secret_sha256, scopes,"
            " extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s,"
            " coalesce(last_used_at < clock_timestamp() - make_interval(secs => :noted_s), true) AS is_use_due"
            " FROM api_keys WHERE id = :id AND revoked_at IS NULL"
            " AND (expires_at IS NULL OR expires_at > clock_timestamp())"
        ),
        {"id": key_id, "noted_s": USE_NOTED_S},
    ).one_or_none()
    if row is None or not hmac.compare_digest(bytes(row.secret_sha256), _digest(secret)):
        return None
    return row


def note_use(conn: Connection, key_id: str) -> None:
    """Notes that the key is used now."""
    # Another process that notes it at this moment, or a revocation, is not waited for.
    conn.execute(
        text(
            "UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = ("
            " SELECT id FROM api_keys WHERE id = :id FOR NO KEY UPDATE SKIP LOCKED)"
        ),
        {"id": key_id},
    )


def add_key(
    conn: Connection,
    tenant: UUID,
    new: NewKey,
    *,
    name: str | None = None,
    scopes: Iterable[str] = ALL_SCOPES,
    expires_at: datetime | None = None,
) -> bool:
    """Writes a key. False where `expires_at` has passed. Raises TooManyKeys."""
    if _count_live(conn, tenant) >= MAX_LIVE_KEYS:
        raise TooManyKeys
    return _insert(conn, tenant, new, name=name, scopes=scopes, expires_at=expires_at)


def _insert(
    conn: Connection,
    tenant: UUID,
    new: NewKey,
    *,
    name: str | None,
    scopes: Iterable[str],
    expires_at: datetime | None,
    replaces: str | None = None,
) -> bool:
    inserted = conn.execute(
        text(
            "INSERT INTO api_keys (id, tenant_id, secret_sha256, name, scopes, expires_at, replaces)"
            " SELECT :id, :tenant, :digest, :name, CAST(:scopes AS text[]), CAST(:expires_at AS timestamptz), :replaces"
            " WHERE CAST(:expires_at AS timestamptz) IS NULL OR :expires_at > clock_timestamp() RETURNING id"
        ),
        {
            "id": new.id,
            "tenant": tenant,
            "digest": _digest(new.secret),
            "name": name,
            "scopes": sorted(set(scopes), key=ALL_SCOPES.index),
            "expires_at": expires_at,
            "replaces": replaces,
        },
    )
    return inserted.one_or_none() is not None


def rotate_key(
    conn: Connection,
    tenant: UUID,
    old: str,
    new: NewKey,
    *,
    expires_at: datetime | None = None,
    old_lives_s: float | None = None,
) -> bool:
    """Writes a successor of the same name and scopes; both work until the old one is revoked.

    expires_at: of the new key; where None it lives as long as the old one was to. old_lives_s: ends the old key after
    that many seconds at the latest. False where `old` is unknown or no longer lives, or `expires_at` has passed.
    Raises AlreadyRotated, TooManyKeys.
    """
    row = conn.execute(
        text(
            "SELECT name, scopes, clock_timestamp() + (expires_at - created_at) AS as_long FROM api_keys"
            " WHERE id = :id AND tenant_id = :tenant AND revoked_at IS NULL"
            " AND (expires_at IS NULL OR expires_at > clock_timestamp()) FOR UPDATE"
        ),
        {"id": old, "tenant": tenant},
    ).one_or_none()
    if row is None:
        return False
    if _count_live(conn, tenant) >= MAX_LIVE_KEYS:
        raise TooManyKeys
    try:
        is_written = _insert(
            conn,
            tenant,
            new,
            name=row.name,
            scopes=row.scopes,
            expires_at=expires_at or row.as_long,
            replaces=old,
        )
    except IntegrityError:
        raise AlreadyRotated from None
    if is_written and old_lives_s is not None:
        conn.execute(
            text(
                "UPDATE api_keys SET expires_at = least(expires_at,"
                " clock_timestamp() + make_interval(secs => :lives_s)) WHERE id = :id"
            ),
            {"id": old, "lives_s": float(old_lives_s)},
        )
    return is_written


def revoke_key(conn: Connection, tenant: UUID, key_id: str) -> bool:
    """Ends a key for good. False where it is unknown; one that has ended before is left as it is."""
    found = conn.execute(
        text(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp())"
            " WHERE id = :id AND tenant_id = :tenant RETURNING id"
        ),
        {"id": key_id, "tenant": tenant},
    )
    return found.one_or_none() is not None


_COLUMNS = (
    "SELECT id, name, scopes, created_at, expires_at, revoked_at, last_used_at, replaces,"
    " CASE WHEN revoked_at IS NOT NULL THEN 'revoked'"
    " WHEN expires_at <= clock_timestamp() THEN 'expired' ELSE 'live' END AS state FROM api_keys"
)


def read_key(conn: Connection, tenant: UUID, key_id: str) -> Row[Any] | None:
    statement = text(f"{_COLUMNS} WHERE id = :id AND tenant_id = :tenant")
    return conn.execute(statement, {"id": key_id, "tenant": tenant}).one_or_none()


def list_keys(conn: Connection, tenant: UUID, *, before: str | None = None, limit: int = 1_000) -> Sequence[Row[Any]]:
    """The tenant's keys, newest first, ended ones too; those made before the key `before`."""
    statement = text(
        f"{_COLUMNS} WHERE tenant_id = :tenant AND (CAST(:before AS text) IS NULL OR (created_at, id) <"
        " (SELECT created_at, id FROM api_keys WHERE id = :before)) ORDER BY created_at DESC, id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"tenant": tenant, "before": before, "limit": limit}).all()


def _count_live(conn: Connection, tenant: UUID) -> int:
    statement = text(
        "SELECT count(*) FROM api_keys WHERE tenant_id = :tenant AND revoked_at IS NULL"
        " AND (expires_at IS NULL OR expires_at > clock_timestamp())"
    )
    num_live: int = conn.execute(statement, {"tenant": tenant}).scalar_one()
    return num_live


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
