"""Retries: jobs that ended without a result, made again in their batch.

A retry is a new job with the old one's input and seed (`retry_of`); the old result stays where it is in the batch's
order and names what supersedes it (`retried_by`). Counts are those of the latest attempts, so a retry takes back what
its jobs had counted as; usage adds up. All under the batch's lock: a result is superseded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import lock_batches
from medley.db.connections import allow_minutes
from medley.db.demand import add_demand
from medley.spec.ids import uuid7s
from medley.spec.jobs import JobState

CHUNK = 5_000  # jobs a statement
RETRIED = (JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)  # states that may be tried again


class NotRetried(Exception):
    """The batch stands so that its jobs would only end again; the text says how to change that."""


@dataclass(frozen=True)
class Wanted:
    """Which results to supersede: their states, and codes of failures (None: any)."""

    states: Sequence[JobState] = (JobState.FAILED,)
    codes: Sequence[str] | None = None


# Jobs of a revision that was quarantined would fail again at once.
_CHOOSE = text(
    "SELECT r.job_id, r.seq FROM job_results r JOIN jobs j ON j.id = r.job_id"
    " LEFT JOIN adapter_revisions a ON a.id = j.revision_id"
    " WHERE r.batch_id = :batch AND r.seq > :after AND r.state <> 'succeeded' AND r.state = ANY(:states)"
    " AND r.retried_by IS NULL AND (CAST(:codes AS text[]) IS NULL OR r.state <> 'failed'"
    "  OR r.error_code = ANY(:codes))"
    " AND a.quarantined_at IS NULL ORDER BY r.seq LIMIT :limit"
)

# One statement, so that the parts cannot disagree about what was superseded.
_RETRY = """
WITH given AS (
    SELECT * FROM unnest(%(new)b::uuid[], %(old)b::uuid[]) AS g(new, old)
), superseded AS (
    UPDATE job_results r SET retried_by = g.new FROM given g WHERE r.job_id = g.old
    RETURNING r.job_id AS old, g.new, r.state, r.error_code
), jobs_made AS (
    INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, is_held, priority, est_tokens, deadline_at)
    SELECT s.new, j.tenant_id, j.batch_id, j.pool, j.revision_id, b.paused_at IS NOT NULL, b.priority, j.est_tokens,
        b.deadline_at
    FROM superseded s JOIN jobs j ON j.id = s.old JOIN batches b ON b.id = j.batch_id
), inputs_made AS (
    INSERT INTO job_inputs (job_id, tenant_id, batch_id, custom_id, adapter, prompt, prompt_token_ids, prompt_idx,
        column_idx, seed, sampling, retry_of)
    SELECT s.new, i.tenant_id, i.batch_id, i.custom_id, i.adapter, i.prompt, i.prompt_token_ids, i.prompt_idx,
        i.column_idx, i.seed, i.sampling, s.old
    FROM superseded s JOIN job_inputs i ON i.job_id = s.old
), by_lane AS (
    SELECT j.batch_id, j.lane, s.state, s.error_code, count(*) AS num
    FROM superseded s JOIN jobs j ON j.id = s.old GROUP BY 1, 2, 3, 4
), lanes_counted AS (
    UPDATE batch_lanes l SET failed = l.failed - c.failed, cancelled = l.cancelled - c.cancelled,
        expired = l.expired - c.expired
    FROM (SELECT batch_id, lane, coalesce(sum(num) FILTER (WHERE state = 'failed'), 0) AS failed,
            coalesce(sum(num) FILTER (WHERE state = 'cancelled'), 0) AS cancelled,
            coalesce(sum(num) FILTER (WHERE state = 'expired'), 0) AS expired
        FROM by_lane GROUP BY batch_id, lane) c
    WHERE l.batch_id = c.batch_id AND l.lane = c.lane
), failures AS (
    UPDATE batch_failures f SET num_jobs = f.num_jobs - c.num
    FROM by_lane c WHERE c.state = 'failed' AND f.batch_id = c.batch_id AND f.lane = c.lane
        AND f.code = coalesce(c.error_code, 'unknown')
), counted AS (
    UPDATE batches b SET failed = b.failed - c.failed, cancelled = b.cancelled - c.cancelled,
        expired = b.expired - c.expired, retried = b.retried + c.num, finished_at = NULL, cancel_requested_at = NULL
    FROM (SELECT batch_id, coalesce(sum(num) FILTER (WHERE state = 'failed'), 0) AS failed,
            coalesce(sum(num) FILTER (WHERE state = 'cancelled'), 0) AS cancelled,
            coalesce(sum(num) FILTER (WHERE state = 'expired'), 0) AS expired, sum(num) AS num
        FROM by_lane GROUP BY batch_id) c
    WHERE b.id = c.batch_id
)
SELECT j.lane, j.revision_id, count(*) AS num FROM superseded s JOIN jobs j ON j.id = s.old GROUP BY 1, 2
"""


def retry(conn: Connection, batch: UUID, wanted: Wanted) -> int:
    """Makes the latest attempts that ended as `wanted` again, as new jobs of the batch. Returns how many.

    Those of quarantined revisions are left as they are. Raises NotRetried.
    """
    allow_minutes(conn)
    lock_batches(conn, [batch])
    row = conn.execute(
        text(
            "SELECT tenant_id, pool, priority, paused_at, finished_at, cancel_requested_at,"
            " coalesce(deadline_at <= clock_timestamp(), false) AS is_late FROM batches WHERE id = :id"
        ),
        {"id": batch},
    ).one()
    if row.cancel_requested_at is not None and row.finished_at is None:
        raise NotRetried("it is being cancelled; retry once what runs has stopped")
    if row.is_late:
        raise NotRetried("its deadline has passed; change deadline_at first (PATCH), to null for none")
    lanes: Counter[tuple[UUID, UUID | None]] = Counter()
    after = 0
    while chosen := _choose(conn, batch, wanted, after):
        after = chosen[-1][1]
        parameters = {"new": uuid7s(len(chosen)), "old": [job for job, _ in chosen]}
        for made in conn.exec_driver_sql(_RETRY, parameters):
            lanes[(made.lane, made.revision_id)] += made.num
    if row.paused_at is None:
        # Its rows stay locked until the commit, so it comes last.
        changes = [(lane, row.priority, row.tenant_id, revision, num) for (lane, revision), num in lanes.items()]
        add_demand(conn, row.pool, changes)
    return lanes.total()


def _choose(conn: Connection, batch: UUID, wanted: Wanted, after: int) -> list[tuple[UUID, int]]:
    rows = conn.execute(
        _CHOOSE,
        {
            "batch": batch,
            "after": after,
            "states": [state.value for state in wanted.states],
            "codes": None if wanted.codes is None else list(wanted.codes),
            "limit": CHUNK,
        },
    )
    return [(row.job_id, row.seq) for row in rows]
