"""Keys and the audit log as the operator has them: at the database, as medley_owner; noted there as over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy import Row

from medley.cli.operating import as_owner, note, tenant_of
from medley.client.types import AuditEntry, Key
from medley.db import keys
from medley.db.audit import read_audit
from medley.spec.scopes import Scope

DEFAULT_SCOPES = (Scope.READ.value, Scope.SUBMIT.value, Scope.ADAPTERS.value)


def create(data_dir: Path, tenant: str, name: str, scopes: Sequence[str], expires_at: datetime | None) -> Key:
    """A new key of the tenant, with its secret."""
    new = keys.NewKey.draw()
    with as_owner(data_dir) as conn:
        owner = tenant_of(conn, tenant)
        try:
            keys.add_key(conn, owner, new, name=name, scopes=scopes or DEFAULT_SCOPES, expires_at=expires_at)
        except keys.TooManyKeys:
            raise _too_many() from None
        row = keys.read_key(conn, owner, new.id)
        assert row is not None
        note(conn, owner, "key.create", keys.public_key_id(new.id), name=name, scopes=row.scopes)
    return msgspec.structs.replace(_key_of(row), api_key=new.text)


def list_all(data_dir: Path, tenant: str) -> list[Key]:
    """The tenant's keys, newest first."""
    with as_owner(data_dir) as conn:
        return [_key_of(row) for row in keys.list_keys(conn, tenant_of(conn, tenant), limit=10_000)]


def rotate(data_dir: Path, tenant: str, key_id: str, old_lives_s: float | None) -> Key:
    """A successor of a key that lives, with its secret."""
    new = keys.NewKey.draw()
    with as_owner(data_dir) as conn:
        owner = tenant_of(conn, tenant)
        old = _parse(key_id)
        try:
            if not keys.rotate_key(conn, owner, old, new, old_lives_s=old_lives_s):
                raise click.ClickException(f"{tenant} has no key {key_id} that lives")
        except keys.AlreadyRotated:
            raise click.ClickException(f"{key_id} was rotated before: revoke it or the newer key first") from None
        except keys.TooManyKeys:
            raise _too_many() from None
        row = keys.read_key(conn, owner, new.id)
        assert row is not None
        note(conn, owner, "key.rotate", key_id, successor=keys.public_key_id(new.id))
    return msgspec.structs.replace(_key_of(row), api_key=new.text)


def revoke(data_dir: Path, tenant: str, key_id: str) -> None:
    """Ends a key for good."""
    with as_owner(data_dir) as conn:
        owner = tenant_of(conn, tenant)
        if not keys.revoke_key(conn, owner, _parse(key_id)):
            raise click.ClickException(f"{tenant} has no key {key_id}")
        note(conn, owner, "key.revoke", key_id)


def audit(data_dir: Path, tenant: str, limit: int) -> list[AuditEntry]:
    """What was done by hand, newest first."""
    with as_owner(data_dir) as conn:
        rows = read_audit(conn, tenant_of(conn, tenant), limit=limit)
    return [
        AuditEntry(
            number=row.id,
            at=row.at,
            key_id=None if row.key_id is None else keys.public_key_id(row.key_id),
            action=row.action,
            object=row.object,
            details=row.details,
            request_id=row.request_id,
            client_address=row.client_address,
        )
        for row in rows
    ]


def _parse(key_id: str) -> str:
    digits = keys.parse_key_id(key_id)
    if digits is None:
        raise click.BadParameter(
            f"got {key_id!r}, wanted mk_ and the digits that follow it in a key", param_hint="KEY_ID"
        )
    return digits


def _key_of(row: Row[Any]) -> Key:
    return Key(
        id=keys.public_key_id(row.id),
        name=row.name,
        scopes=tuple(row.scopes),
        state=row.state,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        replaces=None if row.replaces is None else keys.public_key_id(row.replaces),
    )


def _too_many() -> click.ClickException:
    return click.ClickException(f"the tenant has {keys.MAX_LIVE_KEYS} keys that live: revoke some")
