"""Adapter references, as tenants write them, resolved to revisions.

    name | tenant/name, either with @rev_<hex> or @<8 or more digits of the digest>

A bare name means the newest revision. What the caller may not see is answered as what does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row

from medley.db.adapters import NAME, read_revisions, resolve
from medley.db.tenants import Tenant
from medley.spec.ids import REVISION, parse_id

MAX_REF_CHARS = 400
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_SYNTAX = "an adapter as name or tenant/name, with or without @rev_<hex> or @<8 or more digits of its digest>"


@dataclass(frozen=True)
class Resolved:
    """What a reference means: a revision, or why it has none (`wanted`)."""

    name: str
    revision: UUID | None
    wanted: str | None = None


@dataclass(frozen=True)
class _Ref:
    text: str
    name: str
    pin: str | None


def resolve_refs(conn: Connection, tenant: Tenant, refs: Iterable[str]) -> dict[str, Resolved]:
    """Each of `refs` resolved, in two queries and one more an adapter that is pinned to a revision."""
    found: dict[str, Resolved] = {}
    parsed: list[_Ref] = []
    for text in refs:
        ref = _parse(text, tenant)
        if ref is None:
            found[text] = Resolved(text, None, _SYNTAX)
        else:
            parsed.append(ref)
    if parsed:
        newest = resolve(conn, sorted({ref.name for ref in parsed}))
        for ref in parsed:
            found[ref.text] = _resolve_one(conn, ref, newest.get(ref.name))
    return found


def _parse(text: str, tenant: Tenant) -> _Ref | None:
    if len(text) > MAX_REF_CHARS:
        return None
    path, at, pin = text.partition("@")
    owner, slash, name = path.rpartition("/")
    if not NAME.fullmatch(name) or (at and not (parse_id(REVISION, pin) or _DIGEST_PREFIX.fullmatch(pin))):
        return None
    if slash and owner != tenant.name:
        # No adapter has an empty name: another tenant's adapter looks like one that nobody has.
        return _Ref(text, "", None)
    return _Ref(text, name, pin or None)


def _resolve_one(conn: Connection, ref: _Ref, adapter: Row[Any] | None) -> Resolved:
    if adapter is None:
        return Resolved(ref.name, None, "an adapter of yours that exists")
    revision, is_quarantined = adapter.revision_id, adapter.quarantined_at is not None
    if ref.pin is not None:
        pinned = parse_id(REVISION, ref.pin)
        rows = [
            row
            for row in read_revisions(conn, adapter.id)
            if (row.id == pinned if pinned is not None else row.digest.startswith(ref.pin))
        ]
        if len(rows) != 1:
            return Resolved(
                ref.name, None, "a revision of this adapter" if not rows else "digits of one revision alone"
            )
        revision, is_quarantined = rows[0].id, rows[0].quarantined_at is not None
    if is_quarantined:
        return Resolved(ref.name, None, "a revision that is not quarantined; upload a corrected one")
    return Resolved(ref.name, revision)
