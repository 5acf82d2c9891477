"""/v1/sweeps/{id or name}/report: exact match per adapter with its interval, the base beside it."""

from __future__ import annotations

from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.shapes import Batch, answer, sweep_of
from medley.api.sweeps import with_sweep
from medley.db.batches import read_batch
from medley.db.sweeps import report
from medley.spec.statistics import ReportColumn, wilson

router = APIRouter(prefix="/v1/sweeps")


class Report(msgspec.Struct):
    """A sweep, and a column for each of its adapters and the base."""

    sweep: Batch
    columns: list[ReportColumn]


@router.get("/{sweep_id}/report")
async def read(sweep_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(await with_sweep(who, sweep_id, _report))


def _report(conn: Connection, sweep: UUID) -> Report:
    batch = read_batch(conn, sweep)
    assert batch is not None
    rows, base = report(conn, sweep)
    columns = []
    for row in rows:
        # The base's own column is over all prompts; an adapter's are those of every adapter and its own.
        keys = base.keys() if row.adapter is None else {"", row.adapter}
        base_scored = sum(base.get(key, (0, 0))[0] for key in keys)
        base_correct = sum(base.get(key, (0, 0))[1] for key in keys)
        low, high = wilson(row.num_correct, row.num_scored) if row.num_scored else (None, None)
        columns.append(
            ReportColumn(
                adapter=row.adapter,
                ended=row.num_ended,
                succeeded=row.num_succeeded,
                unsuccessful=row.num_unsuccessful,
                scored=row.num_scored,
                correct=row.num_correct,
                accuracy=_share(row.num_correct, row.num_scored),
                low=low,
                high=high,
                base_scored=base_scored,
                base_correct=base_correct,
                base_accuracy=_share(base_correct, base_scored),
                completion_tokens=row.completion_tokens or 0,
            )
        )
    return Report(sweep_of(batch, msgspec.UNSET), columns)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
