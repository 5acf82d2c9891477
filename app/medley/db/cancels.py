"""Cancels of batches: noted at once, their queue ended a piece a transaction, so that nobody waits for a large one.

Each piece holds the batch and some thousand jobs for some tenths of a second; results of other batches that are stored
together with its own wait no longer than that. Who ends the pieces after the first is `medley.tasks.cancel`. A job
that is claimed before its piece comes is ended by its worker, which computes nothing of it (`inputs`, `flags`).
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import lock_batches
from medley.db.ends import End, end_unclaimed
from medley.spec.ids import oldest_after
from medley.spec.jobs import JobState

PIECE_JOBS = 5_000


def cancel_batch(conn: Connection, batch: UUID) -> bool:
    """Flags the batch, and cancels the first piece of what is queued: all of a small one. Finished results are kept.

    False where the batch has finished.
    """
    lock_batches(conn, [batch])
    flagged = conn.execute(
        text(
            "UPDATE batches SET cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp())"
            " WHERE id = :id AND finished_at IS NULL RETURNING id"
        ),
        {"id": batch},
    ).one_or_none()
    if flagged is None:
        return False
    end_piece(conn, batch, after=None)
    return True


def end_piece(conn: Connection, batch: UUID, *, after: UUID | None) -> UUID | None:
    """Cancels what is queued of the next `PIECE_JOBS` jobs of a cancelled batch.

    after: what this returned for the piece before; None: none was. Returns None once there are no more.
    """
    lock_batches(conn, [batch])
    if conn.execute(_IS_CANCELLED, {"id": batch}).one_or_none() is None:
        return None  # it was retried meanwhile: what is queued now is to run
    bound = {"id": batch, "after": after or oldest_after(batch), "limit": PIECE_JOBS}
    jobs = list(conn.execute(_NEXT_JOBS, bound).scalars())
    if not jobs:
        return None
    end_unclaimed(conn, jobs, End(JobState.CANCELLED))
    return jobs[-1] if len(jobs) == PIECE_JOBS else None


_IS_CANCELLED = text("SELECT FROM batches WHERE id = :id AND cancel_requested_at IS NOT NULL AND finished_at IS NULL")
_NEXT_JOBS = text(
    "SELECT job_id FROM job_inputs WHERE batch_id = :id AND job_id > CAST(:after AS uuid) ORDER BY job_id LIMIT :limit"
)


def read_cancelling(conn: Connection, *, pool: str | None = None, tenant: UUID | None = None) -> dict[UUID, datetime]:
    """{batch: when it was cancelled} of those that have jobs left, of one pool or of one tenant."""
    statement = (
        "SELECT id, cancel_requested_at FROM batches WHERE finished_at IS NULL AND cancel_requested_at IS NOT NULL"
        " AND (CAST(:pool AS text) IS NULL OR pool = :pool) AND (CAST(:tenant AS uuid) IS NULL OR tenant_id = :tenant)"
        " ORDER BY id"
    )
    rows = conn.execute(text(statement), {"pool": pool, "tenant": tenant})
    return {row.id: row.cancel_requested_at for row in rows}
