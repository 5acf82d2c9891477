"""Crashes and quarantine: what happens to the jobs that were in the running step when an engine died.

All of them are suspects. Each may rerun only in a step of at most half as many (`jobs.step_limit`), so the culprit
is found in log2(n) further deaths. A job that was alone in the step three times is quarantined; so is an adapter
revision whose jobs, two at least, were alone three times in all within a day: over weeks any adapter that runs all
the time is near some death that is not its own. Its jobs that are not ended here (held ones, those
of other workers, those that are made at the same moment) end where they would next be run: see `fetch_inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import lock_batches
from medley.db.ends import End, end_unclaimed
from medley.db.webhooks import notify_quarantine
from medley.spec.ids import uuid7

ALONE_LIMIT = 3  # deaths with nothing else in the step before a job or an adapter is quarantined
# A revision's deaths that count; by the transaction's one time, so that what is locked is what is judged.
_LATE = "created_at > now() - interval '24 hours'"
END_LIMIT = 20_000  # queued jobs that a quarantine ends itself: a second's transaction

# Queued jobs are found by pool and lane, which the demand names: no index of `jobs` begins with the lane. A revision
# has one lane for each tenant that may use it.
_QUEUED = (
    " FROM demand d JOIN jobs q ON q.pool = d.pool AND q.lane = d.lane AND q.priority = d.priority"
    " AND q.state = 'queued' AND NOT q.is_held WHERE d.num_queued > 0 AND d.revision_id"
)

# The batches this transaction may touch: the suspects' own, and those with queued jobs of a revision that one more
# death alone would quarantine.
_AT_STAKE = text(
    "SELECT batch_id FROM jobs WHERE id = ANY(:jobs)"
    f" UNION SELECT q.batch_id {_QUEUED} IN ("
    f"  SELECT revision_id FROM crashes WHERE num_suspects = 1 AND {_LATE}"
    "  AND revision_id IN (SELECT revision_id FROM jobs WHERE id = ANY(:jobs))"
    "  GROUP BY revision_id HAVING count(*) >= :limit - 1)"
)

_SUSPECT = """
UPDATE jobs j SET crashes = crashes + %(num_crashes)s, step_limit = %(limit)s
FROM unnest(%(jobs)b::uuid[], %(attempts)b::int4[]) AS r(id, attempt)
WHERE j.id = r.id AND j.attempt = r.attempt
    AND coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND EXISTS (
    SELECT FROM workers w WHERE w.id = %(worker)s AND w.state <> 'gone' AND w.lease_until > clock_timestamp())
RETURNING j.id, j.tenant_id, j.revision_id
"""

_KNOWN = text("SELECT EXISTS (SELECT FROM crashes WHERE job_id = ANY(:jobs) AND death_id = :death)")

_GUILTY_JOBS = text(
    "SELECT job_id FROM crashes WHERE job_id = ANY(:jobs) AND num_suspects = 1 GROUP BY job_id"
    " HAVING count(*) >= :limit"
)

_GUILTY_REVISIONS = text(
    f"SELECT revision_id FROM crashes WHERE revision_id = ANY(:revisions) AND num_suspects = 1 AND {_LATE}"
    " GROUP BY revision_id HAVING count(*) >= :limit AND count(DISTINCT job_id) >= 2 ORDER BY revision_id"
)

# One that another worker's crash has quarantined is no less guilty here.
_QUARANTINED = text("SELECT id FROM adapter_revisions WHERE id = ANY(:revisions) AND quarantined_at IS NOT NULL")


def record_crash(
    conn: Connection, worker: UUID, suspects: Sequence[tuple[UUID, int]], *, death: UUID | None = None
) -> tuple[set[UUID], set[UUID]]:
    """Notes that an engine died with these (job, attempt) in its step. The suspects stay leased to `worker`.

    Returns (jobs to quarantine, adapter revisions of the suspects that are quarantined, now or before): the worker
    ends the former, and its jobs of the latter, by `complete` with `job_quarantined` and `adapter_quarantined`.
    Queued jobs of a revision that is quarantined now are failed here. `death` names the one death, so that a call
    whose answer was lost can be repeated: it counts once and answers the same.
    """
    death = uuid7() if death is None else death
    ids = [job for job, _ in suspects]
    lock_batches(conn, conn.execute(_AT_STAKE, {"jobs": ids, "limit": ALONE_LIMIT}).scalars())
    is_known = conn.execute(_KNOWN, {"jobs": ids, "death": death}).scalar_one()
    rows = conn.exec_driver_sql(
        _SUSPECT,
        {
            "worker": worker,
            "jobs": [job for job, _ in suspects],
            "attempts": [attempt for _, attempt in suspects],
            "limit": max(1, (len(suspects) + 1) // 2),
            "num_crashes": 0 if is_known else 1,
        },
    ).all()
    if not rows:
        return set(), set()
    conn.execute(
        text(
            "INSERT INTO crashes (tenant_id, job_id, revision_id, worker_id, death_id, num_suspects)"
            " VALUES (:tenant, :job, :revision, :worker, :death, :num_suspects) ON CONFLICT DO NOTHING"
        ),
        [
            {
                "tenant": row.tenant_id,
                "job": row.id,
                "revision": row.revision_id,
                "worker": worker,
                "death": death,
                "num_suspects": len(suspects),
            }
            for row in rows
        ],
    )
    jobs = conn.execute(_GUILTY_JOBS, {"jobs": [row.id for row in rows], "limit": ALONE_LIMIT}).scalars()
    revisions = sorted({row.revision_id for row in rows if row.revision_id is not None})
    for guilty in conn.execute(_GUILTY_REVISIONS, {"revisions": revisions, "limit": ALONE_LIMIT}).scalars().all():
        quarantine(conn, guilty)
    return set(jobs), set(conn.execute(_QUARANTINED, {"revisions": revisions}).scalars())


def quarantine(conn: Connection, revision: UUID) -> bool:
    """Fails up to `END_LIMIT` of the revision's queued jobs and refuses new ones. False where that was done before."""
    row = conn.execute(
        text(
            "UPDATE adapter_revisions SET quarantined_at = clock_timestamp()"
            " WHERE id = :id AND quarantined_at IS NULL RETURNING id"
        ),
        {"id": revision},
    ).one_or_none()
    if row is None:
        return False
    notify_quarantine(conn, revision)
    queued = conn.execute(
        text(f"SELECT q.id {_QUEUED} = :revision LIMIT :limit"), {"revision": revision, "limit": END_LIMIT}
    ).scalars()
    end_unclaimed(conn, list(queued), End.quarantined())
    return True


def forget_crashes(conn: Connection, *, older_than_s: float, limit: int = 10_000) -> int:
    """Deletes notes of deaths older than this. Returns how many."""
    return conn.execute(
        text(
            "DELETE FROM crashes WHERE id IN (SELECT id FROM crashes"
            " WHERE created_at < statement_timestamp() - make_interval(secs => :age) LIMIT :limit)"
        ),
        {"age": older_than_s, "limit": limit},
    ).rowcount
