"""/v1/batches/{id}/adapters: how each adapter of a batch stands, from counts that are kept, not from its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, reads
from medley.api.batches import parse_batch, require_batch
from medley.api.decoding import Query
from medley.api.shapes import answer, batch_adapter_of, batch_of
from medley.db.lanes import read_lanes

router = APIRouter(prefix="/v1/batches")


@router.get("/{batch_id}/adapters")
async def read(batch_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    """The batch, and per adapter revision its counts by state, usage, failures by code, rate and time left."""
    Query(request).end()
    batch = parse_batch(batch_id)

    def act(conn: Connection) -> tuple[Row[Any], Sequence[Row[Any]]]:
        return require_batch(conn, batch, batch_id), read_lanes(conn, batch)

    row, lanes = await who.services.sql.run(who.tenant.id, act)
    return answer({"batch": batch_of(row), "adapters": [batch_adapter_of(lane) for lane in lanes]})
