"""The queue: claims, which turn queued rows into assignments, and the ways back into it.

Owns the transitions `queued -> leased` and `leased -> queued`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from uuid import UUID

import msgspec
from sqlalchemy import Connection

from medley.db.batches import lock_batches
from medley.db.demand import add_demand, array_literal, charge
from medley.db.ends import End, end_unclaimed, finite, storable_details
from medley.spec.jobs import Checkpoint, JobState


class Claimed(msgspec.Struct, frozen=True, array_like=True):
    job: UUID
    worker: UUID
    attempt: int
    tenant: UUID
    lane: UUID
    est_tokens: int
    priority: int
    revision: UUID | None


# Of each lane as many as all workers together want; then the workers get theirs, in the order in which they stand in
# `holders`, by their place in `workers`. Arrays hide from the planner how many jobs it thinks are picked: it takes a
# tenth of each lane's, and would read the whole table to find them (measured: 0.2 s for 900 of 600,000); and how many
# workers live: it takes them for one, and would compare each job with all (30 us a job over 286 workers).
_CLAIM = """
WITH want AS (
    SELECT * FROM unnest(%(lanes)b::uuid[], %(counts)b::int4[], %(firsts)b::int4[]) AS w(lane, n, first)
), living AS MATERIALIZED (
    SELECT ARRAY(SELECT w.id FROM unnest(%(workers)b::uuid[]) WITH ORDINALITY AS o(id, ord)
        LEFT JOIN workers w ON w.id = o.id AND w.state IN ('active', 'waking') AND w.lease_until > clock_timestamp()
        ORDER BY o.ord) AS ids
), picked AS MATERIALIZED (
    SELECT q.id, (SELECT ids FROM living)[(%(holders)b::int4[])[w.first + q.k]] AS worker
    FROM want w CROSS JOIN LATERAL (
        SELECT l.id, row_number() OVER () AS k FROM (
            SELECT j.id FROM jobs j
            WHERE j.pool = %(pool)s AND j.lane = w.lane AND j.state = 'queued' AND NOT j.is_held
            ORDER BY j.priority DESC, j.id LIMIT w.n FOR UPDATE SKIP LOCKED
        ) l
    ) q
), claimed AS (
    UPDATE jobs j SET state = 'leased', worker_id = p.worker, attempt = attempt + 1, leased_at = clock_timestamp()
    FROM picked p
    WHERE j.id = p.id AND p.worker IS NOT NULL AND j.id = ANY(ARRAY(SELECT id FROM picked))
    RETURNING j.id, j.worker_id, j.attempt, j.tenant_id, j.lane, j.est_tokens, j.priority, j.revision_id
)
SELECT coalesce(json_agg(json_build_array(id, worker_id, attempt, tenant_id, lane, est_tokens, priority, revision_id)),
    '[]')::text
FROM claimed
"""
_claimed_decoder = msgspec.json.Decoder(list[Claimed])


@dataclass
class Part:
    """What one claim takes for one worker: jobs by lane, and what loads of adapters are charged, in tokens."""

    num_jobs: int = 0
    _lanes: Counter[UUID] = field(default_factory=Counter)
    load_tokens: dict[UUID, float] = field(default_factory=dict)

    @property
    def lanes(self) -> list[tuple[UUID, int]]:
        return list(self._lanes.items())

    def add(self, lane: UUID, num_jobs: int, load_tokens: float = 0.0) -> None:
        self.num_jobs += num_jobs
        self._lanes[lane] += num_jobs
        if load_tokens:
            self.load_tokens[lane] = self.load_tokens.get(lane, 0.0) + load_tokens


def claim(conn: Connection, pool: str, worker: UUID, lanes: Sequence[tuple[UUID, int]]) -> list[Claimed]:
    """Assigns up to n jobs of each (lane, n) to `worker`, as `claim_parts` does."""
    part = Part()
    for lane, num_jobs in lanes:
        part.add(lane, num_jobs)
    return claim_parts(conn, pool, {worker: part})


def claim_parts(conn: Connection, pool: str, parts: Mapping[UUID, Part]) -> list[Claimed]:
    """Assigns to each worker what its part says, as far as there is: the row itself becomes the assignment.

    Charges the tenants by estimate, and for the adapters that their jobs bring to a worker (lanes of which it got
    nothing are not charged). The caller holds its term in this transaction (`leaders.hold_term`). A worker without a
    live lease gets nothing.
    """
    document = conn.exec_driver_sql(_CLAIM, _wants(pool, parts)).scalar_one()
    claimed = _claimed_decoder.decode(document)
    _leave_queue(conn, pool, claimed, parts)
    return claimed


def _wants(pool: str, parts: Mapping[UUID, Part]) -> dict[str, object]:
    """The parameters of `_CLAIM`."""
    holders: dict[UUID, list[int]] = defaultdict(list)
    for place, part in enumerate(parts.values(), start=1):
        for lane, num_jobs in part.lanes:
            holders[lane] += [place] * num_jobs
    counts = [len(places) for places in holders.values()]
    return {
        "pool": pool,
        "workers": list(parts),
        "lanes": list(holders),
        "counts": counts,
        "firsts": list(accumulate(counts[:-1], initial=0)) if counts else [],
        "holders": [place for places in holders.values() for place in places],
    }


def _leave_queue(conn: Connection, pool: str, claimed: Sequence[Claimed], parts: Mapping[UUID, Part]) -> None:
    tokens: dict[UUID, float] = defaultdict(float)
    for worker, lane, tenant in {(job.worker, job.lane, job.tenant) for job in claimed}:
        tokens[tenant] += parts[worker].load_tokens.get(lane, 0.0)
    left: Counter[tuple[UUID, int, UUID, UUID | None]] = Counter()
    for job in claimed:
        tokens[job.tenant] += job.est_tokens
        left[(job.lane, job.priority, job.tenant, job.revision)] += 1
    charge(conn, pool, tokens)
    add_demand(conn, pool, [(*key, -n) for key, n in left.items()])


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
    a second would lock batches after counters.
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
        back: Counter[tuple[UUID, int, UUID, UUID | None]] = Counter()
        for row in here:
            refund[row.tenant_id] -= row.est_tokens
            if not row.is_held:
                back[(row.lane, row.priority, row.tenant_id, row.revision_id)] += 1
        charge(conn, pool, dict(refund))
        add_demand(conn, pool, [(*key, n) for key, n in back.items()])
    for ending in (JobState.CANCELLED, JobState.EXPIRED, JobState.FAILED):
        due = [row.id for row in rows if row.ending == ending]
        if due:
            end_unclaimed(conn, due, End.quarantined() if ending is JobState.FAILED else End(ending))
    return {row.id for row in rows}
