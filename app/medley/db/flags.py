"""Cancel, pause, priority and deadline: what may be said of a batch or a job while it runs.

Setting a flag ends or holds what is still queued in the same transaction (a cancelled batch's, a piece after the other:
`cancels`), so a claim meets no job of a paused one; what is leased is left to its worker, which reads `flagged` each
second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import HIGH, lock_batches
from medley.db.connections import allow_minutes
from medley.db.ends import End, end_unclaimed
from medley.spec.ids import oldest_after
from medley.spec.jobs import JobState


def cancel_job(conn: Connection, job: UUID) -> bool:
    """Cancels a queued job now and asks the worker of a leased one. False for a job that has ended or is unknown."""
    if end_unclaimed(conn, [job], End(JobState.CANCELLED)):
        return True
    asked = conn.execute(
        text("UPDATE jobs SET is_cancel_requested = true WHERE id = :id AND state = 'leased' RETURNING id"),
        {"id": job},
    )
    if asked.one_or_none() is not None:
        return True
    # Between the two statements the job may have gone back into the queue.
    return bool(end_unclaimed(conn, [job], End(JobState.CANCELLED)))


_HOLD = """
WITH held AS (
    UPDATE jobs j SET is_held = %(held)s
    WHERE j.id IN (SELECT i.job_id FROM job_inputs i WHERE i.batch_id = %(batch)s AND i.job_id >= %(oldest)s)
        AND j.state = 'queued' AND j.is_held <> %(held)s
    RETURNING j.pool, j.lane, j.priority, j.tenant_id, j.revision_id
)
INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued, first_id)
SELECT pool, lane, priority, tenant_id, revision_id, count(*) * %(sign)s,
    CASE WHEN %(held)s THEN NULL ELSE %(batch)s::uuid END
FROM held
GROUP BY pool, lane, priority, tenant_id, revision_id
"""


def pause_batch(conn: Connection, batch: UUID) -> bool:
    """Holds what is queued; workers release what they run, with checkpoints. False where it has finished."""
    return _set_paused(conn, batch, "clock_timestamp()", held=True)


def resume_batch(conn: Connection, batch: UUID) -> bool:
    """Lets held jobs wait again. False where the batch has finished."""
    return _set_paused(conn, batch, "NULL", held=False)


def _set_paused(conn: Connection, batch: UUID, paused_at: str, *, held: bool) -> bool:
    lock_batches(conn, [batch])
    statement = f"UPDATE batches SET paused_at = {paused_at} WHERE id = :id AND finished_at IS NULL RETURNING id"
    if conn.execute(text(statement), {"id": batch}).one_or_none() is None:
        return False
    allow_minutes(conn)
    parameters = {"batch": batch, "oldest": oldest_after(batch), "held": held, "sign": -1 if held else 1}
    conn.exec_driver_sql(_HOLD, parameters)
    return True


# The demand follows jobs that have `moved` from one priority (`was`) to another.
_MOVE_DEMAND = """changes AS (
    SELECT pool, lane, was AS priority, tenant_id, revision_id, -1 AS n, NULL::uuid AS id FROM moved
    UNION ALL SELECT pool, lane, priority, tenant_id, revision_id, 1, id FROM moved
), demanded AS (
    INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued, first_id)
    SELECT pool, lane, priority, tenant_id, revision_id, sum(n), min(id::text)::uuid FROM changes
    GROUP BY pool, lane, priority, tenant_id, revision_id
)"""

# Jobs that a near deadline has raised are put in their place too, and raised again where it is still near.
_CHANGE = f"""
WITH was AS (
    SELECT j.id, j.priority, j.state FROM jobs j
    WHERE j.id IN (SELECT i.job_id FROM job_inputs i WHERE i.batch_id = %(batch)s AND i.job_id >= %(oldest)s)
        AND j.state IN ('queued', 'leased')
        AND (j.priority, j.deadline_at) IS DISTINCT FROM (%(priority)s::int2, %(deadline_at)s::timestamptz)
    FOR UPDATE
), changed AS (
    UPDATE jobs j SET priority = %(priority)s, deadline_at = %(deadline_at)s FROM was WHERE j.id = was.id
    RETURNING j.id, j.pool, j.lane, was.priority AS was, j.priority, was.state, j.tenant_id, j.revision_id, j.is_held
), moved AS (
    SELECT * FROM changed WHERE state = 'queued' AND NOT is_held AND was <> priority
), {_MOVE_DEMAND}
SELECT count(*) FROM changed
"""

# An absent column is left alone: null is a value of one.
_CHANGES = {"priority": "priority = :priority", "deadline_at": "deadline_at = :deadline_at"}


def change_batch(conn: Connection, batch: UUID, changes: Mapping[str, Any]) -> None:
    """Sets those of priority and deadline_at (None: none) that are in `changes`, of a batch and its jobs.

    What runs keeps running, under the new deadline. Of a finished batch they hold for what is retried or added.
    """
    if not changes:
        return
    lock_batches(conn, [batch])
    listed = ", ".join(_CHANGES[name] for name in changes)
    row = conn.execute(
        text(f"UPDATE batches SET {listed} WHERE id = :id RETURNING priority, deadline_at, finished_at"),
        {"id": batch, **changes},
    ).one()
    if row.finished_at is None:
        allow_minutes(conn)
        parameters = {"batch": batch, "oldest": oldest_after(batch)}
        conn.exec_driver_sql(_CHANGE, parameters | {"priority": row.priority, "deadline_at": row.deadline_at})


class Flag(StrEnum):
    CANCEL = "cancel"
    EXPIRE = "expire"
    RELEASE = "release"  # its batch is paused


@dataclass(frozen=True)
class Flagged:
    job: UUID
    attempt: int
    flag: Flag


_FLAGGED = text(
    "SELECT j.id, j.attempt, CASE"
    " WHEN j.is_cancel_requested OR b.cancel_requested_at IS NOT NULL THEN 'cancel'"
    " WHEN j.deadline_at <= clock_timestamp() THEN 'expire' ELSE 'release' END AS flag"
    " FROM jobs j JOIN batches b ON b.id = j.batch_id"
    " WHERE j.worker_id = :worker AND j.state = 'leased' AND (j.is_cancel_requested"
    "  OR b.cancel_requested_at IS NOT NULL OR b.paused_at IS NOT NULL OR j.deadline_at <= clock_timestamp())"
)


def flagged(conn: Connection, worker: UUID) -> list[Flagged]:
    """The worker's jobs that must not run on: cancelled, past their deadline, or of a paused batch."""
    return [Flagged(row.id, row.attempt, Flag(row.flag)) for row in conn.execute(_FLAGGED, {"worker": worker})]


def expire_queued(conn: Connection, limit: int = 5_000) -> set[UUID]:
    """Expires queued jobs past their deadline, held ones too, `limit` a call. Returns their batches."""
    due = conn.execute(
        text(
            "SELECT id, batch_id FROM jobs WHERE state = 'queued' AND deadline_at IS NOT NULL"
            " AND deadline_at <= statement_timestamp() LIMIT :limit"
        ),
        {"limit": limit},
    ).all()
    if end_unclaimed(conn, [row.id for row in due], End(JobState.EXPIRED)) == 0:
        return set()
    return {row.batch_id for row in due}


# Jobs that others are writing are left for the next call, so this waits for no job's lock.
_HASTEN = f"""
WITH near AS (
    SELECT id, priority FROM jobs WHERE state = 'queued' AND deadline_at IS NOT NULL AND priority < %(high)s
        AND deadline_at <= statement_timestamp() + make_interval(secs => %(within_s)s)
        AND (%(batches)s::uuid[] IS NULL OR batch_id = ANY(%(batches)s::uuid[]))
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), raised AS (
    UPDATE jobs j SET priority = %(high)s FROM near WHERE j.id = near.id
    RETURNING j.id, j.pool, j.lane, near.priority AS was, j.priority, j.tenant_id, j.revision_id, j.is_held
), moved AS (
    SELECT * FROM raised WHERE NOT is_held
), {_MOVE_DEMAND}
SELECT count(*) FROM raised
"""


def hasten(conn: Connection, within_s: float, batches: Sequence[UUID] | None = None, limit: int = 5_000) -> int:
    """Raises queued jobs whose deadline is within `within_s` seconds to the highest priority. Returns how many.

    Of `batches` alone, where they are given.
    """
    parameters = {
        "high": HIGH,
        "within_s": float(within_s),
        "limit": limit,
        "batches": None if batches is None else list(batches),
    }
    count: int = conn.exec_driver_sql(_HASTEN, parameters).scalar_one()
    return count
