"""Forecasts of open batches: when each will be done, as the dispatcher last judged. They promise nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

# The nearest deadlines, and the oldest of the rest: who comes later has time to be looked at later.
_READ_OPEN = text(
    "WITH near AS (SELECT id FROM batches WHERE pool = :pool AND finished_at IS NULL AND deadline_at IS NOT NULL"
    "  ORDER BY deadline_at LIMIT :limit),"
    " oldest AS (SELECT id FROM batches WHERE pool = :pool AND finished_at IS NULL ORDER BY id LIMIT :limit)"
    " SELECT b.id, b.tenant_id, t.weight, b.priority,"
    "  b.total - b.succeeded - b.failed - b.cancelled - b.expired AS num_left,"
    "  extract(epoch FROM b.deadline_at - clock_timestamp())::float8 AS due_s,"
    "  extract(epoch FROM clock_timestamp() - b.created_at)::float8 AS age_s"
    " FROM batches b JOIN tenants t ON t.id = b.tenant_id"
    " WHERE b.id IN (SELECT id FROM near UNION SELECT id FROM oldest)"
    "  AND b.paused_at IS NULL AND b.cancel_requested_at IS NULL"
)


def read_open(conn: Connection, pool: str, limit: int = 1_000) -> Sequence[Row[Any]]:
    """(id, tenant_id, weight, priority, num_left, due_s, age_s) of batches that are not done, paused or cancelled.

    Up to `limit` by deadline and as many by age. due_s: seconds to the deadline, None where there is none;
    age_s: since it was made.
    """
    return conn.execute(_READ_OPEN, {"pool": pool, "limit": limit}).all()


_WRITE = """
INSERT INTO batch_forecasts AS f (batch_id, tenant_id, ends_at, is_late)
SELECT b.id, b.tenant_id, clock_timestamp() + make_interval(secs => r.ends_in_s), r.is_late
FROM unnest(%(batches)b::uuid[], %(ends_in_s)b::float8[], %(are_late)b::bool[]) AS r(id, ends_in_s, is_late)
JOIN batches b ON b.id = r.id AND b.finished_at IS NULL ORDER BY b.id
ON CONFLICT (batch_id) DO UPDATE SET ends_at = excluded.ends_at, is_late = excluded.is_late,
    made_at = clock_timestamp()
"""


def write(conn: Connection, forecasts: Sequence[tuple[UUID, float, bool]], *, keep_s: float) -> None:
    """Stores (batch, seconds until it is done, whether that is late), and forgets what is older than `keep_s`.

    The caller holds its term.
    """
    conn.execute(
        text("DELETE FROM batch_forecasts WHERE made_at < clock_timestamp() - make_interval(secs => :keep_s)"),
        {"keep_s": keep_s},
    )
    if forecasts:
        batches, ends_in_s, are_late = zip(*forecasts, strict=True)
        conn.exec_driver_sql(
            _WRITE, {"batches": list(batches), "ends_in_s": list(ends_in_s), "are_late": list(are_late)}
        )
