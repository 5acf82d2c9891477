"""OpenAI batches: the row beside a native batch that holds its file, its state and when its next step is due.

A step is taken by moving `due_at` on, and renewed while it works: a task that dies is followed by another once the
time has passed. Two that work at once do no harm, since each write looks at the state that it starts from. A retry
takes a batch back from its end: what may come twice, its finalization, is known by when it began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.batches import lock_batches
from medley.db.connections import allow_minutes
from medley.db.lanes import Lane, add_lanes
from medley.db.quotas import give_back
from medley.db.webhooks import notify_finished
from medley.spec.ids import oldest_after

TAKEN_S = 15.0  # for which a step that was taken, or renewed, is left to its task
ENDS = ("failed", "completed", "expired", "cancelled")


@dataclass(frozen=True, kw_only=True)
class NewOpenAIBatch:
    endpoint: str
    input_file: UUID
    completion_window: str
    metadata: str | None  # JSON
    output_expires_after_s: int | None


def create_openai_batch(conn: Connection, batch: UUID, tenant: UUID, new: NewOpenAIBatch) -> None:
    """Writes the row beside a batch that was opened in this transaction. Its first step is due at once."""
    conn.execute(
        text(
            "INSERT INTO openai_batches (id, tenant_id, endpoint, input_file_id, completion_window, metadata,"
            " output_expires_after_s) VALUES (:id, :tenant, :endpoint, :file, :window, CAST(:metadata AS jsonb),"
            " :expires)"
        ),
        {
            "id": batch,
            "tenant": tenant,
            "endpoint": new.endpoint,
            "file": new.input_file,
            "window": new.completion_window,
            "metadata": new.metadata,
            "expires": new.output_expires_after_s,
        },
    )


_READ = (
    "SELECT o.*, b.pool, b.priority, b.deadline_at, b.created_at, b.cancel_requested_at, b.paused_at, b.finished_at,"
    " b.total, b.succeeded, b.failed, b.cancelled, b.expired, b.prompt_tokens, b.completion_tokens, b.last_seq,"
    " b.retried"
    " FROM openai_batches o JOIN batches b ON b.id = o.id"
)


def read_openai_batch(conn: Connection, batch: UUID) -> Row[Any] | None:
    """The row, with what its native batch says."""
    return conn.execute(text(f"{_READ} WHERE o.id = :id"), {"id": batch}).one_or_none()


def list_openai_batches(conn: Connection, *, after: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """The caller's, newest first, older than `after`."""
    where = "WHERE CAST(:after AS uuid) IS NULL OR o.id < CAST(:after AS uuid) ORDER BY o.id DESC LIMIT :limit"
    return conn.execute(text(f"{_READ} {where}"), {"after": after, "limit": limit}).all()


_COUNT = text(
    "SELECT count(*) FILTER (WHERE num_succeeded = num_jobs) AS num_completed,"
    " count(*) FILTER (WHERE num_ended > num_succeeded) AS num_failed FROM ("
    "  SELECT count(*) AS num_jobs, count(r.job_id) AS num_ended,"
    "   count(*) FILTER (WHERE r.state = 'succeeded') AS num_succeeded"
    "  FROM job_inputs i LEFT JOIN job_results r ON r.job_id = i.job_id AND r.job_id >= :oldest"
    "  WHERE i.batch_id = :id AND i.job_id >= :oldest AND r.retried_by IS NULL GROUP BY i.custom_id) q"
)


def count_requests(conn: Connection, batch: UUID) -> tuple[int, int]:
    """(completed, failed) requests of a batch whose requests are several jobs each, by their latest attempts."""
    row = conn.execute(_COUNT, {"id": batch, "oldest": oldest_after(batch)}).one()
    return row.num_completed, row.num_failed


def hasten_step(conn: Connection, batch: UUID) -> None:
    """Lets a task look at once at a batch that is not at an end, such as after a cancel."""
    statement = (
        "UPDATE openai_batches SET due_at = clock_timestamp()"
        " WHERE id = :id AND due_at > clock_timestamp() AND state IN ('validating', 'in_progress')"
    )
    conn.execute(text(statement), {"id": batch})


def begin_finalizing(conn: Connection, pool: str) -> int:
    """Lets the files be written of each batch of the pool whose jobs have all ended. Returns how many there were."""
    which = (
        "o.state = 'in_progress' AND o.due_at IS NULL AND b.id = o.id AND b.pool = :pool AND b.finished_at IS NOT NULL"
    )
    # A retry that is being committed has its batch locked, which has not finished after it: it is left for later.
    found = f"SELECT o.id FROM openai_batches o, batches b WHERE {which} FOR NO KEY UPDATE OF b SKIP LOCKED"
    ended = list(conn.execute(text(found), {"pool": pool}).scalars())
    if not ended:
        return 0
    begin = (
        "UPDATE openai_batches o SET state = 'finalizing', finalizing_at = clock_timestamp(),"
        f" due_at = clock_timestamp() FROM batches b WHERE {which} AND o.id = ANY(:ids)"
    )
    return conn.execute(text(begin), {"pool": pool, "ids": ended}).rowcount


def read_due(conn: Connection, pool: str) -> list[UUID]:
    """The pool's batches with a step that no task works on."""
    statement = (
        "SELECT o.id FROM openai_batches o JOIN batches b ON b.id = o.id"
        " WHERE o.due_at <= statement_timestamp() AND b.pool = :pool ORDER BY o.due_at"
    )
    return list(conn.execute(text(statement), {"pool": pool}).scalars())


def take_step(conn: Connection, batch: UUID, pool: str) -> Row[Any] | None:
    """Takes the step that is due for `TAKEN_S`. None where none is, another task works on it, or another pool's does:
    each has a model of its own.
    """
    taken = conn.execute(
        text(
            "UPDATE openai_batches o SET due_at = clock_timestamp() + make_interval(secs => :taken_s) FROM batches b"
            " WHERE o.id = :id AND o.due_at <= clock_timestamp() AND b.id = o.id AND b.pool = :pool RETURNING o.id"
        ),
        {"id": batch, "pool": pool, "taken_s": TAKEN_S},
    ).one_or_none()
    return None if taken is None else read_openai_batch(conn, batch)


def renew_step(conn: Connection, batch: UUID, state: str, *, began_at: datetime | None = None) -> bool:
    """Keeps a step. False where the batch has left `state` or is cancelled: then the task leaves it.

    began_at: of a finalization, `finalizing_at` as it was when the step was taken; after a retry it is another.
    """
    kept = conn.execute(
        text(
            "UPDATE openai_batches o SET due_at = clock_timestamp() + make_interval(secs => :taken_s)"
            " FROM batches b WHERE o.id = :id AND b.id = o.id AND o.state = :state"
            " AND CASE WHEN o.state = 'finalizing' THEN o.finalizing_at = :began_at"
            "  ELSE b.cancel_requested_at IS NULL END RETURNING o.id"
        ),
        {"id": batch, "state": state, "began_at": began_at, "taken_s": TAKEN_S},
    ).one_or_none()
    return kept is not None


def leave_step(conn: Connection, batch: UUID) -> None:
    """Lets another task take the step now."""
    statement = "UPDATE openai_batches SET due_at = clock_timestamp() WHERE id = :id AND due_at IS NOT NULL"
    conn.execute(text(statement), {"id": batch})


def begin_jobs(
    conn: Connection,
    batch: UUID,
    *,
    num_requests: int,
    models: Mapping[str, UUID | None],
    lanes: Sequence[Lane],
) -> bool:
    """The input is valid: from here on its lines become jobs. False where it was not validating any more.

    models: each model that the lines name, and the revision that it means (None: the base). lanes: what the jobs of
    all lines add to the batch, so that it can be counted by adapter before they are made.
    """
    num_jobs = sum(lane.num_jobs for lane in lanes)
    lock_batches(conn, [batch])
    row = conn.execute(
        text(
            "UPDATE openai_batches SET state = 'in_progress', in_progress_at = clock_timestamp(), next_offset = 0,"
            " due_at = clock_timestamp(), num_requests = :num_requests, num_jobs = :num_jobs, model = :model"
            " WHERE id = :id AND state = 'validating' RETURNING tenant_id"
        ),
        {
            "id": batch,
            "num_requests": num_requests,
            "num_jobs": num_jobs,
            "model": next(iter(models)) if len(models) == 1 else None,
        },
    ).one_or_none()
    if row is None:
        return False
    conn.execute(text("UPDATE batches SET total = :total WHERE id = :id"), {"id": batch, "total": num_jobs})
    add_lanes(conn, batch, row.tenant_id, lanes)
    conn.exec_driver_sql(
        "INSERT INTO openai_batch_models (batch_id, model, tenant_id, revision_id)"
        " SELECT %(batch)s, r.model, %(tenant)s, r.revision"
        " FROM unnest(%(models)b::text[], %(revisions)b::uuid[]) AS r(model, revision)",
        {"batch": batch, "tenant": row.tenant_id, "models": list(models), "revisions": list(models.values())},
    )
    return True


def read_models(conn: Connection, batch: UUID) -> Sequence[Row[Any]]:
    """(model, revision_id, is_quarantined, is_revoked) as validated."""
    statement = (
        "SELECT m.model, m.revision_id, r.quarantined_at IS NOT NULL AS is_quarantined,"
        " coalesce(r.tenant_id <> m.tenant_id AND NOT medley_may_use(m.tenant_id, r.id), false) AS is_revoked"
        " FROM openai_batch_models m LEFT JOIN adapter_revisions r ON r.id = m.revision_id WHERE m.batch_id = :id"
    )
    return conn.execute(text(statement), {"id": batch}).all()


def lock_expansion(conn: Connection, batch: UUID) -> Row[Any] | None:
    """The batch, locked, while lines of it become jobs; None where they do not (any more)."""
    lock_batches(conn, [batch])
    row = read_openai_batch(conn, batch)
    return row if row is not None and row.next_offset is not None else None


def advance(conn: Connection, batch: UUID, next_offset: int | None) -> None:
    """Notes up to where lines have become jobs, in the transaction that made them (None: all have)."""
    conn.execute(
        text(
            "UPDATE openai_batches SET next_offset = :next, input_lost_at = NULL,"
            " due_at = CASE WHEN CAST(:next AS bigint) IS NOT NULL"
            "  THEN clock_timestamp() + make_interval(secs => :taken_s) END WHERE id = :id"
        ),
        {"id": batch, "next": next_offset, "taken_s": TAKEN_S},
    )


_STOP = text(
    "WITH was AS (SELECT b.id, b.total, b.queued_bytes, b.succeeded + b.failed + b.cancelled + b.expired AS num_ended,"
    "  (SELECT count(*) FROM job_inputs i WHERE i.batch_id = b.id AND i.job_id >= :oldest AND i.retry_of IS NULL)"
    "  AS num_made"
    "  FROM batches b WHERE b.id = :id)"
    " UPDATE batches b SET total = was.num_made,"
    "  finished_at = CASE WHEN was.num_ended = was.num_made THEN coalesce(b.finished_at, clock_timestamp()) END,"
    "  queued_bytes = CASE WHEN was.num_ended = was.num_made THEN 0 ELSE was.queued_bytes END"
    " FROM was WHERE b.id = was.id RETURNING b.tenant_id, was.total - was.num_made AS num_missing,"
    "  was.queued_bytes - b.queued_bytes AS num_bytes"
)


_STOP_LANES = text(
    "UPDATE batch_lanes l SET total = coalesce(made.num, 0) FROM batch_lanes k LEFT JOIN ("
    "  SELECT j.revision_id, count(*) AS num FROM job_inputs i JOIN jobs j ON j.id = i.job_id"
    "  WHERE i.batch_id = :id AND i.job_id >= :oldest AND i.retry_of IS NULL GROUP BY j.revision_id"
    " ) made ON made.revision_id IS NOT DISTINCT FROM k.revision_id"
    " WHERE l.batch_id = :id AND k.batch_id = :id AND l.revision_id IS NOT DISTINCT FROM k.revision_id"
)


def stop_expansion(conn: Connection, batch: UUID, errors: str) -> None:
    """Lets the batch end, as failed with `errors` (JSON), once the jobs that it has do. The batch is locked.

    What was reserved for the lines that become none is given back, with all of the prompts' bytes where it ends now.
    Where no line is left, nothing is wrong.
    """
    allow_minutes(conn)
    advance(conn, batch, None)
    made = {"id": batch, "oldest": oldest_after(batch)}
    row = conn.execute(_STOP, made).one()
    if row.num_missing == 0:
        return
    conn.execute(
        text("UPDATE openai_batches SET errors = CAST(:errors AS jsonb) WHERE id = :id"),
        {"id": batch, "errors": errors},
    )
    conn.execute(_STOP_LANES, made)
    give_back(conn, row.tenant_id, num_jobs=row.num_missing, num_bytes=row.num_bytes)


def note_lost_input(conn: Connection, batch: UUID, *, is_missing: bool) -> Row[Any]:
    """Notes that the input could not be read: it is not in the store, or the store does not say.

    Returns (lost_s, is_late, cancel_requested_at): for how long it has been missing, whether the deadline has passed.
    """
    return conn.execute(
        text(
            "UPDATE openai_batches o SET"
            " input_lost_at = CASE WHEN :is_missing THEN coalesce(o.input_lost_at, clock_timestamp()) END"
            " FROM batches b WHERE o.id = :id AND b.id = o.id"
            " RETURNING coalesce(extract(epoch FROM clock_timestamp() - o.input_lost_at), 0)::float8 AS lost_s,"
            "  coalesce(b.deadline_at <= clock_timestamp(), false) AS is_late, b.cancel_requested_at"
        ),
        {"id": batch, "is_missing": is_missing},
    ).one()


def end_without_jobs(conn: Connection, batch: UUID, state: str, *, errors: str | None = None) -> bool:
    """Ends a batch that is validating: failed with its errors (JSON), or cancelled. False where it is no more."""
    lock_batches(conn, [batch])
    ended = conn.execute(
        text(
            "UPDATE openai_batches SET state = :state, ended_at = clock_timestamp(), due_at = NULL,"
            " errors = CAST(:errors AS jsonb) WHERE id = :id AND state = 'validating' RETURNING id"
        ),
        {"id": batch, "state": state, "errors": errors},
    ).one_or_none()
    if ended is None:
        return False
    conn.execute(text("UPDATE batches SET finished_at = clock_timestamp() WHERE id = :id"), {"id": batch})
    notify_finished(conn, batch)
    return True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What finalising found. `output_file` and `error_file` are stored, or None where they would be empty."""

    num_completed: int
    num_failed: int
    input_tokens: int
    output_tokens: int
    output_file: UUID | None
    error_file: UUID | None


def end_finalized(conn: Connection, batch: UUID, found: Outcome, *, began_at: datetime) -> str | None:
    """The end of a batch whose files are stored; returns its state. None where another task was first.

    began_at: `finalizing_at` as it was when the results were read. After a retry they are not the latest.
    """
    state: str | None = conn.execute(
        text(
            "UPDATE openai_batches o SET state = CASE WHEN b.cancel_requested_at IS NOT NULL THEN 'cancelled'"
            "  WHEN o.errors IS NOT NULL THEN 'failed' WHEN b.expired > 0 THEN 'expired' ELSE 'completed' END,"
            " ended_at = clock_timestamp(), due_at = NULL, num_completed = :num_completed, num_failed = :num_failed,"
            " input_tokens = :input_tokens, output_tokens = :output_tokens, output_file_id = :output_file,"
            " error_file_id = :error_file FROM batches b"
            " WHERE o.id = :id AND b.id = o.id AND o.state = 'finalizing' AND o.finalizing_at = :began_at"
            " RETURNING o.state"
        ),
        {
            "id": batch,
            "began_at": began_at,
            "num_completed": found.num_completed,
            "num_failed": found.num_failed,
            "input_tokens": found.input_tokens,
            "output_tokens": found.output_tokens,
            "output_file": found.output_file,
            "error_file": found.error_file,
        },
    ).scalar_one_or_none()
    if state is not None:
        notify_finished(conn, batch)
    return state


def reopen(conn: Connection, batch: UUID) -> int:
    """Takes a batch back in progress, some of whose jobs are made again in this transaction. The batch is locked.

    It names no files until it ends again; those that it named stay as they are. Returns their bytes.
    """
    statement = (
        "WITH was AS (SELECT o.id, (SELECT coalesce(sum(f.size_bytes), 0)::bigint FROM files f"
        "  WHERE f.id IN (o.output_file_id, o.error_file_id)) AS num_bytes FROM openai_batches o WHERE o.id = :id)"
        " UPDATE openai_batches o SET state = 'in_progress', due_at = NULL, finalizing_at = NULL, ended_at = NULL,"
        " num_completed = NULL, num_failed = NULL, output_file_id = NULL, error_file_id = NULL FROM was"
        " WHERE o.id = was.id AND o.state NOT IN ('validating', 'in_progress') RETURNING was.num_bytes"
    )
    num_bytes: int | None = conn.execute(text(statement), {"id": batch}).scalar_one_or_none()
    return num_bytes or 0
