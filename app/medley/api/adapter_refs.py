"""Adapter references, as tenants write them, resolved to revisions.

    name | tenant/name, either with @rev_<hex> or @<8 or more digits of the digest>

Without either, the newest revision is meant; of another tenant's adapter, the newest that was granted.
What the caller may not see is answered as what does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row

from medley.db.adapters import NAME, read_revisions, resolve
from medley.db.grants import read_shared
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
    owner: str | None  # None: the caller
    name: str
    pin: str | None


@dataclass(frozen=True)
class _Revision:
    id: UUID
    digest: str
    is_quarantined: bool


def resolve_refs(conn: Connection, caller: str, refs: Iterable[str]) -> dict[str, Resolved]:
    """Each of `refs` resolved, in two queries and one more an adapter of the caller's that is pinned to a revision.

    caller: the name of the transaction's tenant.
    """
    found: dict[str, Resolved] = {}
    parsed: list[_Ref] = []
    for text in refs:
        ref = _parse(text, caller)
        if ref is None:
            found[text] = Resolved(text, None, _SYNTAX)
        else:
            parsed.append(ref)
    own = resolve(conn, sorted({ref.name for ref in parsed if ref.owner is None})) if parsed else {}
    shared = read_shared(conn, sorted({(ref.owner, ref.name) for ref in parsed if ref.owner is not None}))
    for ref in parsed:
        if ref.owner is None:
            revisions = _own_revisions(conn, ref, own.get(ref.name))
        else:
            rows = shared.get((ref.owner, ref.name), [])
            revisions = [_Revision(row.revision_id, row.digest, row.quarantined_at is not None) for row in rows]
        found[ref.text] = _resolve_one(ref, revisions)
    return found


def _parse(text: str, caller: str) -> _Ref | None:
    if len(text) > MAX_REF_CHARS:
        return None
    path, at, pin = text.partition("@")
    owner, slash, name = path.rpartition("/")
    if not NAME.fullmatch(name) or (at and not (parse_id(REVISION, pin) or _DIGEST_PREFIX.fullmatch(pin))):
        return None
    if "\0" in owner or not owner.isascii():
        return None
    return _Ref(text, owner if slash and owner != caller else None, name, pin or None)


def _own_revisions(conn: Connection, ref: _Ref, adapter: Row[Any] | None) -> list[_Revision]:
    """What a reference to the caller's own adapter may mean, the newest first: all of them only where it is pinned."""
    if adapter is None:
        return []
    if ref.pin is None:
        return [_Revision(adapter.revision_id, adapter.digest, adapter.quarantined_at is not None)]
    rows = read_revisions(conn, adapter.id)
    return [_Revision(row.id, row.digest, row.quarantined_at is not None) for row in rows]


def _resolve_one(ref: _Ref, revisions: Sequence[_Revision]) -> Resolved:
    if not revisions:
        return Resolved(ref.name, None, "an adapter of yours, or one that is shared with you")
    revision = revisions[0]
    if ref.pin is not None:
        pinned = parse_id(REVISION, ref.pin)
        pin = ref.pin
        fitting = [r for r in revisions if (r.id == pinned if pinned is not None else r.digest.startswith(pin))]
        if len(fitting) != 1:
            return Resolved(
                ref.name, None, "a revision of this adapter" if not fitting else "digits of one revision alone"
            )
        revision = fitting[0]
    if revision.is_quarantined:
        return Resolved(ref.name, None, "a revision that is not quarantined; upload a corrected one")
    return Resolved(ref.name, revision.id)
