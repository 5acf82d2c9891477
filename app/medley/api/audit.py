"""/v1/audit: who changed what by hand, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Row

from medley.api.auth import Caller, administers
from medley.api.decoding import Query
from medley.api.shapes import answer
from medley.db.audit import read_audit
from medley.db.keys import public_key_id

MAX_PAGE = 1_000
PAGE = 100
MAX_NUMBER = 2**63 - 1

router = APIRouter(prefix="/v1/audit")


class Entry(msgspec.Struct, kw_only=True):
    """`key_id` null: the operator did it."""

    number: int
    at: datetime
    key_id: str | None
    action: str
    object: str
    details: dict[str, Any]
    request_id: str | None
    client_address: str | None


@router.get("")
async def read(request: Request, who: Caller = Depends(administers)) -> Response:
    query = Query(request)
    limit = query.whole("limit", PAGE, low=1, high=MAX_PAGE)
    before = query.whole("before", MAX_NUMBER, low=1, high=MAX_NUMBER)
    query.end()
    rows = await who.services.sql.run(
        who.tenant.id, lambda conn: read_audit(conn, who.tenant.id, before=before, limit=limit)
    )
    entries = [entry_of(row) for row in rows]
    return answer({"entries": entries, "next": entries[-1].number if len(entries) == limit else None})


def entry_of(row: Row[Any]) -> Entry:
    """From a row of `audit.read_audit`."""
    return Entry(
        number=row.id,
        at=row.at,
        key_id=None if row.key_id is None else public_key_id(row.key_id),
        action=row.action,
        object=row.object,
        details=row.details,
        request_id=row.request_id,
        client_address=row.client_address,
    )
