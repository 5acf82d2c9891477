"""/v1/batches/{id}/results: what has ended, in the order in which it was committed, from a cursor on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, reads
from medley.api.batches import parse_batch
from medley.api.decoding import Query
from medley.api.errors import NotFound
from medley.api.jobs import MAX_WAIT_S
from medley.api.shapes import NDJSON, Result, answer, answer_lines, result_of
from medley.db.batches import read_batch
from medley.db.results import read_results

MAX_RESULTS = 10_000
RESULTS = 1_000
MAX_SEQ = 2**63 - 1
INCLUDES = {"tokens"}
VIEWS = ("all", "latest")  # latest: without results that a retry has superseded

router = APIRouter(prefix="/v1/batches")


@dataclass(frozen=True)
class _Asked:
    batch: UUID
    after: int
    limit: int
    with_tokens: bool
    only_latest: bool


class _Page(msgspec.Struct):
    results: list[Result]
    next: int
    finished: bool


@router.get("/{batch_id}/results")
async def read(batch_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    query = Query(request)
    after = query.whole("after", 0, low=0, high=MAX_SEQ)
    limit = query.whole("limit", RESULTS, low=1, high=MAX_RESULTS)
    wait_s = query.seconds("wait", high=MAX_WAIT_S)
    include = set((query.text("include") or "").split(",")) - {""}
    if not include <= INCLUDES:
        query.refuse("include", "tokens, or nothing")
    view = query.text("view") or "all"
    if view not in VIEWS:
        query.refuse("view", " or ".join(VIEWS))
    query.end()
    asked = _Asked(parse_batch(batch_id), after, limit, "tokens" in include, view == "latest")
    page = await _read(who, asked, batch_id)
    if wait_s > 0 and not page.results and not page.finished:
        with who.services.hub.watch(who.tenant.id, asked.batch, after=after) as watch:
            has_come = await watch.wait(wait_s)
        if has_come:
            page = await _read(who, asked, batch_id)
    if NDJSON in request.headers.get("accept", ""):
        headers = {"X-Medley-Next": str(page.next), "X-Medley-Finished": str(page.finished).lower()}
        return await who.services.sql.call(lambda: answer_lines(page.results, headers))
    return await who.services.sql.call(lambda: answer(page))


async def _read(who: Caller, asked: _Asked, batch_id: str) -> _Page:
    def act(conn: Connection) -> tuple[Row[Any] | None, Sequence[Row[Any]]]:
        # The batch first: results that come between the two reads are then seen, and never thought to be all.
        batch = read_batch(conn, asked.batch)
        rows = read_results(
            conn,
            asked.batch,
            after=asked.after,
            limit=asked.limit,
            with_details=asked.with_tokens,
            only_latest=asked.only_latest,
        )
        return batch, rows

    batch, rows = await who.services.sql.run(who.tenant.id, act)
    if batch is None:
        raise NotFound("batch", batch_id)
    last = rows[-1].seq if rows else asked.after
    if asked.only_latest and not rows:
        last = max(last, batch.last_seq)  # what is left out at the end has been passed, too
    # Beside the loop: of 10,000 results it took a tenth of a second.
    results = await who.services.sql.call(lambda: [result_of(row, with_tokens=asked.with_tokens) for row in rows])
    return _Page(results, last, batch.finished_at is not None and last >= batch.last_seq)
