"""/v1/usage: what workers did for the caller, by day, adapter or revision."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.shapes import answer
from medley.db.usage import By, read_usage
from medley.spec.ids import REVISION, public_id

DAYS = 30  # shown where no first day is given

router = APIRouter(prefix="/v1/usage")


class UsageRow(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`day`, or `adapter` and `revision` (both null: the base), as asked for."""

    day: date | msgspec.UnsetType = msgspec.UNSET
    adapter: str | msgspec.UnsetType | None = msgspec.UNSET
    revision: str | msgspec.UnsetType | None = msgspec.UNSET
    num_jobs: int
    prompt_tokens: int
    completion_tokens: int


class UsageReport(msgspec.Struct, rename={"first": "from", "last": "to"}):
    """Usage of the days `from` to `to` (UTC), both included; `total` of all rows."""

    first: date
    last: date
    by: str
    rows: list[UsageRow]
    total: UsageRow


@router.get("")
async def read(request: Request, who: Caller = Depends(reads)) -> Response:
    """Jobs that ended on the days `from` to `to` (UTC, both included) and the tokens that they took."""
    query = Query(request)
    last = query.typed("to", date, "a day as 2026-01-31") or datetime.now(UTC).date()
    first = query.typed("from", date, "a day as 2026-01-01") or _days_before(last, DAYS - 1)
    by = query.text("by") or By.DAY
    if by not in list(By):
        query.refuse("by", " or ".join(By))
        by = By.DAY
    if first > last:
        query.refuse("from", f"a day not after {last}")
    query.end()

    def act(conn: Connection) -> Sequence[Row[Any]]:
        return read_usage(conn, first, last, By(by))

    rows = [_row_of(row, By(by)) for row in await who.services.sql.run(who.tenant.id, act)]
    total = UsageRow(
        num_jobs=sum(row.num_jobs for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        completion_tokens=sum(row.completion_tokens for row in rows),
    )
    return answer(UsageReport(first, last, by, rows, total))


def _days_before(day: date, num_days: int) -> date:
    return date.fromordinal(max(1, day.toordinal() - timedelta(days=num_days).days))


def _row_of(row: Row[Any], by: By) -> UsageRow:
    shown = UsageRow(num_jobs=row.num_jobs, prompt_tokens=row.prompt_tokens, completion_tokens=row.completion_tokens)
    if by is By.DAY:
        shown.day = row.day
    else:
        shown.adapter = row.adapter
        shown.revision = None if row.revision_id is None else public_id(REVISION, row.revision_id)
    return shown
