"""/v1/sweeps/{id or name}/report: exact match per adapter with its interval, the base beside it."""

from __future__ import annotations

import math
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from medley.api.auth import Caller, caller
from medley.api.decoding import Query
from medley.api.shapes import Batch, answer, sweep_of
from medley.api.sweeps import with_sweep
from medley.db.batches import read_batch
from medley.db.sweeps import report

Z_95 = 1.959964  # the standard normal's 97.5 % point

router = APIRouter(prefix="/v1/sweeps")


class Column(msgspec.Struct, kw_only=True):
    """One adapter (null: the base). The base's figures are over this adapter's own prompts."""

    adapter: str | None
    ended: int
    succeeded: int
    unsuccessful: int
    scored: int
    correct: int
    accuracy: float | None
    low: float | None
    high: float | None
    base_scored: int
    base_correct: int
    base_accuracy: float | None
    completion_tokens: int


class Report(msgspec.Struct):
    sweep: Batch
    columns: list[Column]


@router.get("/{sweep_id}/report")
async def read(sweep_id: str, request: Request, who: Caller = Depends(caller)) -> Response:
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
        low, high = wilson(row.num_correct, row.num_scored)
        columns.append(
            Column(
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


def wilson(num_correct: int, num_scored: int) -> tuple[float | None, float | None]:
    """The 95 % score interval of a share (Wilson 1927); (None, None) of nothing."""
    if num_scored == 0:
        return None, None
    share, z2 = num_correct / num_scored, Z_95**2
    middle = share + z2 / (2 * num_scored)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_scored + z2 / (4 * num_scored**2))
    scale = 1 + z2 / num_scored
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
