"""The queue: claims, which turn queued rows into assignments, and the ways back into it.

Owns the transitions `queued -> leased` and `leased -> queued`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from uuid import UUID

import msgspec
from sqlalchemy import Connection

from medley.db.batches import lock_batches
from medley.db.demand import Change, add_demand, array_literal, charge
from medley.db.ends import End, end_unclaimed, finite, storable_details
from medley.spec.jobs import Checkpoint, JobState


@dataclass(frozen=True)
class Want:
    """Jobs of one lane and priority that one worker is to have, and what the load of their adapter is charged."""

    worker: UUID
    lane: UUID
    priority: int
    num_jobs: int
    load_tokens: float = 0.0


@dataclass(frozen=True)
class Claimed:
    """What came of a want: the jobs' ids in hex, in order, each with its attempt, and what they were charged."""

    want: Want
    jobs: Sequence[tuple[str, int]]
    est_tokens: float


# Of each lane as many as all its wants together; then each want gets its own, in the order in which they stand in
# `takers`. Arrays hide from the planner how many jobs it thinks are picked: it takes a tenth of each lane's, and
# would read the whole table to find them (measured: 0.2 s for 900 of 600,000); and how many workers live: it takes
# them for one, and would compare each job with all (30 us a job over 286 workers). `starts`: where in a lane to
# begin, so that what was claimed before and is kept for somebody's snapshot is not read again (`dispatcher.heads`).
_CLAIM = """
WITH living AS MATERIALIZED (
    SELECT ARRAY(SELECT w.id FROM unnest(%(workers)b::uuid[]) WITH ORDINALITY AS o(id, ord)
        LEFT JOIN workers w ON w.id = o.id AND w.state IN ('active', 'waking')
            AND w.held_state IS DISTINCT FROM 'asleep' AND w.lease_until > clock_timestamp()
        ORDER BY o.ord) AS ids
), picked AS MATERIALIZED (
    SELECT q.id, (%(takers)b::int4[])[l.first + q.k] AS taker
    FROM unnest(%(lanes)b::uuid[], %(priorities)b::int2[], %(starts)b::uuid[], %(counts)b::int4[], %(firsts)b::int4[])
        AS l(lane, priority, start, n, first) CROSS JOIN LATERAL (
        SELECT found.id, row_number() OVER () AS k FROM (
            SELECT j.id FROM jobs j
            WHERE j.pool = %(pool)s AND j.lane = l.lane AND j.priority = l.priority AND j.id >= l.start
                AND j.state = 'queued' AND NOT j.is_held
            ORDER BY j.id LIMIT l.n FOR UPDATE SKIP LOCKED
        ) found
    ) q
), claimed AS (
    UPDATE jobs j SET state = 'leased', worker_id = (SELECT ids FROM living)[p.taker], attempt = attempt + 1,
        leased_at = clock_timestamp()
    FROM picked p
    WHERE j.id = p.id AND (SELECT ids FROM living)[p.taker] IS NOT NULL AND j.id = ANY(ARRAY(SELECT id FROM picked))
    RETURNING j.id, j.attempt, j.tenant_id, j.lane, j.est_tokens, j.priority, j.revision_id, p.taker
), given AS MATERIALIZED (
    SELECT taker, tenant_id, lane, priority, revision_id, count(*) AS n, sum(est_tokens) AS est_tokens,
        json_agg(json_build_array(encode(uuid_send(id), 'hex'), attempt) ORDER BY id) AS jobs
    FROM claimed GROUP BY taker, tenant_id, lane, priority, revision_id
), charged AS (
    INSERT INTO counter_changes (pool, tenant_id, service)
    SELECT %(pool)s, t.id, u.tokens / t.weight FROM (
        SELECT tenant_id, sum(est_tokens + (%(load_tokens)b::float8[])[taker]) AS tokens FROM given GROUP BY tenant_id
    ) u JOIN tenants t ON t.id = u.tenant_id
), undemanded AS (
    INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued)
    SELECT %(pool)s, lane, priority, tenant_id, revision_id, -sum(n)::int4 FROM given
    GROUP BY lane, priority, tenant_id, revision_id
)
SELECT coalesce(json_agg(json_build_array(taker, est_tokens, jobs)), '[]')::text FROM given
"""
_given_decoder = msgspec.json.Decoder(list[tuple[int, float, list[tuple[str, int]]]])
_ANYWHERE = UUID(int=0)


def claim(
    conn: Connection, pool: str, wants: Sequence[Want], starts: Mapping[tuple[UUID, int], UUID] | None = None
) -> list[Claimed]:
    """Gives each worker the jobs that it is to have, as far as there are: the row itself becomes the assignment.

    Charges the tenants by estimate, and for the adapters that their jobs bring to a worker (not where it got none).
    starts: by lane and priority, the id below which nothing is looked for. The caller holds its term in this
    transaction (`leaders.hold_term`). A worker without a live lease gets nothing; a want of nothing has no answer.
    """
    document = conn.exec_driver_sql(_CLAIM, _parameters(pool, wants, starts or {})).scalar_one()
    return [Claimed(wants[taker - 1], jobs, tokens) for taker, tokens, jobs in _given_decoder.decode(document)]


def _parameters(pool: str, wants: Sequence[Want], starts: Mapping[tuple[UUID, int], UUID]) -> dict[str, object]:
    takers: dict[tuple[UUID, int], list[int]] = defaultdict(list)
    for place, want in enumerate(wants, start=1):
        takers[(want.lane, want.priority)] += [place] * want.num_jobs
    counts = [len(places) for places in takers.values()]
    return {
        "pool": pool,
        "workers": [want.worker for want in wants],
        "load_tokens": [want.load_tokens for want in wants],
        "lanes": [lane for lane, _ in takers],
        "priorities": [priority for _, priority in takers],
        "starts": [starts.get(key, _ANYWHERE) for key in takers],
        "counts": counts,
        "firsts": list(accumulate(counts[:-1], initial=0)) if counts else [],
        "takers": [place for places in takers.values() for place in places],
    }


@dataclass(frozen=True)
class Release:
    """A job given back by its worker, with what it has generated so far."""

    job: UUID
    attempt: int
    checkpoint: Checkpoint | None


_RELEASABLE = """
SELECT j.id, j.batch_id FROM jobs j JOIN unnest(%(jobs)b::uuid[], %(attempts)b::int4[]) AS r(id, attempt)
    ON j.id = r.id AND j.attempt = r.attempt
WHERE coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND EXISTS (
    SELECT FROM workers w WHERE w.id = %(worker)s AND w.state <> 'gone' AND w.lease_until > clock_timestamp())
"""

_SAVE_CHECKPOINTS = """
INSERT INTO checkpoints (job_id, tenant_id, token_ids, logprobs, details)
SELECT j.id, j.tenant_id, r.token_ids::int4[], r.logprobs::float4[], r.details::jsonb
FROM unnest(%(jobs)b::uuid[], %(token_ids)b::text[], %(logprobs)b::text[], %(details)b::text[])
    AS r(id, token_ids, logprobs, details)
JOIN jobs j ON j.id = r.id AND j.state = 'queued'
ON CONFLICT (job_id) DO UPDATE SET token_ids = excluded.token_ids, logprobs = excluded.logprobs,
    details = excluded.details
"""


def release(conn: Connection, worker: UUID, releases: Sequence[Release]) -> list[UUID]:
    """Puts a live worker's jobs back with their checkpoints. Returns the jobs that matched (the rest is fenced)."""
    found = conn.exec_driver_sql(
        _RELEASABLE,
        {"worker": worker, "jobs": [r.job for r in releases], "attempts": [r.attempt for r in releases]},
    ).all()
    back = requeue(conn, [Holding(row.id, worker, row.batch_id) for row in found])
    kept = [r for r in releases if r.job in back and r.checkpoint is not None and r.checkpoint.token_ids]
    if kept:
        conn.exec_driver_sql(
            _SAVE_CHECKPOINTS,
            {
                "jobs": [r.job for r in kept],
                "token_ids": [array_literal(r.checkpoint.token_ids) for r in kept if r.checkpoint],
                "logprobs": [array_literal(finite(r.checkpoint.logprobs)) for r in kept if r.checkpoint],
                "details": [_details(r.checkpoint) for r in kept if r.checkpoint],
            },
        )
    return sorted(back)


def _details(checkpoint: Checkpoint) -> str | None:
    if checkpoint.details is None:
        return None
    return msgspec.json.encode(storable_details(checkpoint.details)).decode()


_REQUEUE = """
UPDATE jobs j SET state = 'queued', worker_id = NULL, leased_at = NULL, is_held = b.paused_at IS NOT NULL
FROM unnest(%(jobs)b::uuid[], %(workers)b::uuid[]) AS r(id, worker), batches b
WHERE j.id = r.id AND coalesce(j.worker_id = r.worker AND j.state = 'leased', false) AND b.id = j.batch_id
RETURNING j.id, j.tenant_id, j.pool, j.lane, j.priority, j.revision_id, j.est_tokens, j.is_held,
    CASE WHEN j.is_cancel_requested OR b.cancel_requested_at IS NOT NULL THEN 'cancelled'
         WHEN j.deadline_at <= clock_timestamp() THEN 'expired'
         WHEN EXISTS (SELECT FROM adapter_revisions r WHERE r.id = j.revision_id AND r.quarantined_at IS NOT NULL)
         THEN 'failed' END AS ending
"""


@dataclass(frozen=True)
class Holding:
    """A job as it was seen at its worker."""

    job: UUID
    worker: UUID
    batch: UUID


def requeue(conn: Connection, holdings: Sequence[Holding]) -> set[UUID]:
    """`leased -> queued` for jobs that their workers still hold, or on to their end where one is due.

    Refunds the estimate that the claim charged. Returns the ids that left their worker. One call a transaction:
    a second would lock batches out of order.
    """
    if not holdings:
        return set()
    lock_batches(conn, [h.batch for h in holdings])
    rows = conn.exec_driver_sql(
        _REQUEUE, {"jobs": [h.job for h in holdings], "workers": [h.worker for h in holdings]}
    ).all()
    for pool in {row.pool for row in rows}:
        here = [row for row in rows if row.pool == pool]
        refund: Counter[UUID] = Counter()
        back: dict[tuple[UUID, int, UUID, UUID | None], list[UUID]] = defaultdict(list)
        for row in here:
            refund[row.tenant_id] -= row.est_tokens
            if not row.is_held:
                back[(row.lane, row.priority, row.tenant_id, row.revision_id)].append(row.id)
        charge(conn, pool, refund)
        add_demand(conn, pool, [Change(*lane, len(ids), min(ids)) for lane, ids in back.items()])
    for ending in (JobState.CANCELLED, JobState.EXPIRED, JobState.FAILED):
        due = [row.id for row in rows if row.ending == ending]
        if due:
            end_unclaimed(conn, due, End.quarantined() if ending is JobState.FAILED else End(ending))
    return {row.id for row in rows}
