"""Crashes and quarantine: what happens to the jobs that were in the running step when an engine died.

All of them are suspects. Each may rerun only in a step of at most half as many (`jobs.step_limit`), so the culprit
is found in log2(n) further deaths. A job that was alone in the step three times is quarantined; so is an adapter
revision whose jobs, two at least, were alone three times in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import lock_batches
from medley.db.ends import End, end_unclaimed

ALONE_LIMIT = 3  # deaths with nothing else in the step before a job or an adapter is quarantined

# The batches this transaction may touch: the suspects' own, and those with queued jobs of a revision that one more
# death alone would quarantine.
_AT_STAKE = text(
    "SELECT batch_id FROM jobs WHERE id = ANY(:jobs)"
    " UNION SELECT q.batch_id FROM jobs q WHERE q.state = 'queued' AND q.lane IN ("
    "  SELECT revision_id FROM crashes WHERE num_suspects = 1"
    "  AND revision_id IN (SELECT revision_id FROM jobs WHERE id = ANY(:jobs))"
    "  GROUP BY revision_id HAVING count(*) >= :limit - 1)"
)

_SUSPECT = """
UPDATE jobs j SET crashes = crashes + 1, step_limit = %(limit)s
FROM unnest(%(jobs)b::uuid[], %(attempts)b::int4[]) AS r(id, attempt)
WHERE j.id = r.id AND j.attempt = r.attempt
    AND coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND EXISTS (
    SELECT FROM workers w WHERE w.id = %(worker)s AND w.state <> 'gone' AND w.lease_until > clock_timestamp())
RETURNING j.id, j.tenant_id, j.revision_id
"""

_GUILTY_JOBS = text(
    "SELECT job_id FROM crashes WHERE job_id = ANY(:jobs) AND num_suspects = 1 GROUP BY job_id"
    " HAVING count(*) >= :limit"
)

_GUILTY_REVISIONS = text(
    "SELECT revision_id FROM crashes WHERE revision_id = ANY(:revisions) AND num_suspects = 1 GROUP BY revision_id"
    " HAVING count(*) >= :limit AND count(DISTINCT job_id) >= 2"
)


def record_crash(conn: Connection, worker: UUID, suspects: Sequence[tuple[UUID, int]]) -> tuple[set[UUID], set[UUID]]:
    """Notes that an engine died with these (job, attempt) in its step. The suspects stay leased to `worker`.

    Returns (jobs to quarantine, adapter revisions that are now quarantined): the worker ends the former, and its
    jobs of the latter, by `complete` with `job_quarantined` and `adapter_quarantined`. Queued jobs of a quarantined
    revision are failed here.
    """
    jobs_at_stake = {"jobs": [job for job, _ in suspects], "limit": ALONE_LIMIT}
    lock_batches(conn, conn.execute(_AT_STAKE, jobs_at_stake).scalars())
    rows = conn.exec_driver_sql(
        _SUSPECT,
        {
            "worker": worker,
            "jobs": [job for job, _ in suspects],
            "attempts": [attempt for _, attempt in suspects],
            "limit": max(1, (len(suspects) + 1) // 2),
        },
    ).all()
    if not rows:
        return set(), set()
    conn.execute(
        text(
            "INSERT INTO crashes (tenant_id, job_id, revision_id, worker_id, num_suspects)"
            " VALUES (:tenant, :job, :revision, :worker, :num_suspects)"
        ),
        [
            {
                "tenant": row.tenant_id,
                "job": row.id,
                "revision": row.revision_id,
                "worker": worker,
                "num_suspects": len(suspects),
            }
            for row in rows
        ],
    )
    jobs = conn.execute(_GUILTY_JOBS, {"jobs": [row.id for row in rows], "limit": ALONE_LIMIT}).scalars()
    revisions = {row.revision_id for row in rows if row.revision_id is not None}
    guilty = conn.execute(_GUILTY_REVISIONS, {"revisions": list(revisions), "limit": ALONE_LIMIT}).scalars()
    return set(jobs), {revision for revision in guilty if quarantine(conn, revision)}


def quarantine(conn: Connection, revision: UUID) -> bool:
    """Fails the revision's queued jobs and refuses new ones. False where that was done before."""
    row = conn.execute(
        text(
            "UPDATE adapter_revisions SET quarantined_at = clock_timestamp()"
            " WHERE id = :id AND quarantined_at IS NULL RETURNING id"
        ),
        {"id": revision},
    ).one_or_none()
    if row is None:
        return False
    queued = conn.execute(
        text("SELECT id FROM jobs WHERE lane = :revision AND state = 'queued'"), {"revision": revision}
    ).scalars()
    end_unclaimed(conn, list(queued), End.quarantined())
    return True
