"""Retries: jobs that ended without a result, made again in their batch.

A retry is a new job with the old one's input and seed (`retry_of`); the old result stays where it is in the batch's
order and names what supersedes it (`retried_by`). Counts are those of the latest attempts, so a retry takes back what
its jobs had counted as; usage adds up. All under the batch's lock: a result is superseded once. An OpenAI batch is
taken back in progress with it; its files are written anew once it ends again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.batches import TenantClosing, lock_batches
from medley.db.connections import allow_minutes
from medley.db.demand import Change, add_demand
from medley.db.openai_batches import reopen
from medley.spec.ids import oldest_after, uuid7s
from medley.spec.jobs import JobState

CHUNK = 5_000  # jobs a statement


class NotRetried(Exception):
    """The batch stands so that its jobs would only end again; the text says how to change that."""


@dataclass(frozen=True)
class Wanted:
    """Which results to supersede: their states, and codes of failures (None: any)."""

    states: Sequence[JobState] = (JobState.FAILED,)
    codes: Sequence[str] | None = None


@dataclass(frozen=True)
class Retried:
    """What a retry has made: jobs, and the bytes of their prompts.

    `num_file_bytes`: of the files that an OpenAI batch had named, as large as those that it will write.
    """

    num_jobs: int
    num_bytes: int
    num_file_bytes: int = 0


# Jobs of a revision that was quarantined, or that is shared no longer, would fail again at once; a deleted adapter
# gets no new ones.
_CHOOSE = text(
    "SELECT r.job_id, r.seq FROM job_results r JOIN jobs j ON j.id = r.job_id"
    " LEFT JOIN adapter_revisions a ON a.id = j.revision_id LEFT JOIN adapters d ON d.id = a.adapter_id"
    " WHERE r.batch_id = :batch AND r.job_id >= :oldest AND r.seq > :after AND r.state <> 'succeeded'"
    " AND r.state = ANY(:states) AND r.retried_by IS NULL AND (CAST(:codes AS text[]) IS NULL OR r.state <> 'failed'"
    "  OR r.error_code = ANY(:codes))"
    " AND (j.revision_id IS NULL OR a.quarantined_at IS NULL AND a.id IS NOT NULL AND d.deleted_at IS NULL)"
    " ORDER BY r.seq LIMIT :limit"
)

# Of an OpenAI batch that was never in progress, by its state.
_WITHOUT_JOBS = {
    "validating": "its input file is being validated, so it has no jobs yet",
    "failed": "its input file was refused, so it has no jobs; create a batch from a corrected file",
    "cancelled": "it was cancelled before it had jobs; create it again",
}

# One statement, so that the parts cannot disagree about what was superseded. Its jobs lie between `first` and `last`.
_RETRY = """
WITH given AS (
    SELECT * FROM unnest(%(new)b::uuid[], %(old)b::uuid[]) AS g(new, old)
), superseded AS (
    UPDATE job_results r SET retried_by = g.new FROM given g
    WHERE r.job_id = g.old AND r.job_id BETWEEN %(first)s AND %(last)s
    RETURNING r.job_id AS old, g.new, r.state, r.error_code
), jobs_made AS (
    INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, is_shared, is_held, priority, est_tokens, deadline_at)
    SELECT s.new, j.tenant_id, j.batch_id, j.pool, j.revision_id, j.is_shared, b.paused_at IS NOT NULL, b.priority,
        j.est_tokens, b.deadline_at
    FROM superseded s JOIN jobs j ON j.id = s.old JOIN batches b ON b.id = j.batch_id
), inputs_made AS (
    INSERT INTO job_inputs (job_id, tenant_id, batch_id, custom_id, adapter, prompt, prompt_token_ids, prompt_idx,
        column_idx, seed, sampling, retry_of, continuation, continuation_token_ids, sample_idx, is_templated, answer)
    SELECT s.new, i.tenant_id, i.batch_id, i.custom_id, i.adapter, i.prompt, i.prompt_token_ids, i.prompt_idx,
        i.column_idx, i.seed, i.sampling, s.old, i.continuation, i.continuation_token_ids, i.sample_idx,
        i.is_templated, i.answer
    FROM superseded s JOIN job_inputs i ON i.job_id = s.old AND i.job_id BETWEEN %(first)s AND %(last)s
    RETURNING coalesce(octet_length(prompt), 4 * cardinality(prompt_token_ids), 0) AS num_bytes
), ended AS (
    SELECT j.batch_id, j.tenant_id, j.revision_id, s.state, coalesce(s.error_code, 'unknown') AS code, count(*) AS num
    FROM superseded s JOIN jobs j ON j.id = s.old GROUP BY 1, 2, 3, 4, 5
), lanes_ended AS (
    SELECT batch_id, tenant_id, revision_id, coalesce(sum(num) FILTER (WHERE state = 'failed'), 0) AS failed,
        coalesce(sum(num) FILTER (WHERE state = 'cancelled'), 0) AS cancelled,
        coalesce(sum(num) FILTER (WHERE state = 'expired'), 0) AS expired, sum(num) AS num
    FROM ended GROUP BY 1, 2, 3
), lanes_counted AS (
    INSERT INTO batch_lanes AS l (batch_id, tenant_id, revision_id, failed, cancelled, expired)
    SELECT batch_id, tenant_id, revision_id, -failed, -cancelled, -expired FROM lanes_ended
    ON CONFLICT (batch_id, revision_id) DO UPDATE SET failed = l.failed + excluded.failed,
        cancelled = l.cancelled + excluded.cancelled, expired = l.expired + excluded.expired
), failures_counted AS (
    INSERT INTO batch_failures AS f (batch_id, tenant_id, revision_id, code, num_jobs)
    SELECT batch_id, tenant_id, revision_id, code, -num FROM ended WHERE state = 'failed'
    ON CONFLICT (batch_id, revision_id, code) DO UPDATE SET num_jobs = f.num_jobs + excluded.num_jobs
), counted AS (
    UPDATE batches b SET failed = b.failed - c.failed, cancelled = b.cancelled - c.cancelled,
        expired = b.expired - c.expired, retried = b.retried + c.num, finished_at = NULL, cancel_requested_at = NULL
    FROM (SELECT batch_id, sum(failed) AS failed, sum(cancelled) AS cancelled, sum(expired) AS expired, sum(num) AS num
        FROM lanes_ended GROUP BY batch_id) c
    WHERE b.id = c.batch_id
)
SELECT j.lane, j.revision_id, count(*) AS num, (SELECT sum(num_bytes) FROM inputs_made) AS num_bytes
FROM superseded s JOIN jobs j ON j.id = s.old GROUP BY 1, 2
"""


def retry(conn: Connection, batch: UUID, wanted: Wanted) -> Retried:
    """Makes the latest attempts that ended as `wanted` again, as new jobs of the batch. The caller reserves for them.

    Those of revisions that are quarantined, shared no longer or deleted are left as they are. Raises NotRetried and
    TenantClosing.
    """
    allow_minutes(conn)
    lock_batches(conn, [batch])
    row = _judge(conn, batch)
    lanes: Counter[tuple[UUID, UUID | None]] = Counter()
    num_bytes = 0
    after = 0
    while chosen := _choose(conn, batch, wanted, after):
        after = chosen[-1][1]
        made = _make(conn, batch, [job for job, _ in chosen])
        for lane in made:
            lanes[(lane.lane, lane.revision_id)] += lane.num
        num_bytes += int(made[0].num_bytes)
    num_file_bytes = reopen(conn, batch) if lanes and row.openai_state is not None else 0
    if row.paused_at is None:
        changes = [
            Change(lane, row.priority, row.tenant_id, revision, num, first=batch)
            for (lane, revision), num in lanes.items()
        ]
        add_demand(conn, row.pool, changes)
    return Retried(lanes.total(), num_bytes, num_file_bytes)


def _judge(conn: Connection, batch: UUID) -> Row[Any]:
    """The batch. Raises NotRetried, TenantClosing."""
    row = conn.execute(
        text(
            "SELECT b.tenant_id, b.pool, b.priority, b.paused_at, b.finished_at, b.cancel_requested_at,"
            " coalesce(b.deadline_at <= clock_timestamp(), false) AS is_late, o.state AS openai_state,"
            " o.in_progress_at, t.delete_requested_at IS NOT NULL AS is_closing FROM batches b"
            " JOIN tenants t ON t.id = b.tenant_id LEFT JOIN openai_batches o ON o.id = b.id WHERE b.id = :id"
        ),
        {"id": batch},
    ).one()
    if row.is_closing:
        raise TenantClosing
    if row.openai_state is not None and row.in_progress_at is None:
        raise NotRetried(_WITHOUT_JOBS[row.openai_state])
    if row.cancel_requested_at is not None and row.finished_at is None:
        raise NotRetried("it is being cancelled; retry once what runs has stopped")
    if row.is_late:
        raise NotRetried("its deadline has passed; change deadline_at first (PATCH), to null for none")
    return row


def _choose(conn: Connection, batch: UUID, wanted: Wanted, after: int) -> list[tuple[UUID, int]]:
    rows = conn.execute(
        _CHOOSE,
        {
            "batch": batch,
            "oldest": oldest_after(batch),
            "after": after,
            "states": [state.value for state in wanted.states],
            "codes": None if wanted.codes is None else list(wanted.codes),
            "limit": CHUNK,
        },
    )
    return [(row.job_id, row.seq) for row in rows]


def _make(conn: Connection, batch: UUID, old: list[UUID]) -> Sequence[Row[Any]]:
    """(lane, revision_id, num, num_bytes of all) of the jobs made in the place of `old`."""
    new = uuid7s(len(old), after=batch)
    return conn.exec_driver_sql(_RETRY, {"new": new, "old": old, "first": min(old), "last": max(old)}).all()
