"""/v1/workers: the pool's workers, without a word about whose jobs they run."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Row

from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.shapes import answer
from medley.db.workers import read_workers
from medley.spec.ids import WORKER, public_id

router = APIRouter(prefix="/v1/workers")


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    pool = who.services.settings.pool
    rows = await who.services.sql.run(who.tenant.id, lambda conn: read_workers(conn, pool))
    return answer({"workers": [_worker(row) for row in rows]})


def _worker(row: Row[Any]) -> dict[str, object]:
    return {
        "id": public_id(WORKER, row.id),
        "state": row.state,
        "desired_state": row.desired_state,
        "max_num_seqs": row.max_num_seqs,
        # Row-level security counts the caller's own jobs alone, and that is all he may know.
        "num_leased": row.num_leased,
        # Which adapters are resident would tell of other tenants.
        "num_resident": len(row.resident),
        "stats": {name: value for name, value in row.stats.items() if name not in ("resident", "type")},
    }
