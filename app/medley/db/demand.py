"""What shadows the queue: `demand` (jobs that wait, by lane and priority) and `tenant_counters` (service charged).

Both are views, of sums and of changes that are not in them yet. Whoever makes or ends jobs inserts changes: no row
that two writers want, and none whose dead versions anybody has to pass. The leader sums them up (`medley.db.changes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection, text

# A tenth of the time of `repr`, which shows: a result has dozens of log-probabilities.
_encode_json = msgspec.json.Encoder().encode


class Change(NamedTuple):
    """Jobs that came to a lane, or left it. first: none of those that came has a lower id; None: none came."""

    lane: UUID
    priority: int
    tenant: UUID
    revision: UUID | None
    num_queued: int
    first: UUID | None = None


def lane_of(tenant: UUID, revision: UUID | None, *, is_shared: bool) -> UUID:
    """The queue of one revision (None: the base) for one tenant, as the column `jobs.lane` has it.

    is_shared: the revision is another tenant's, whose own lane it must not be.
    """
    if revision is None:
        return tenant
    return UUID(bytes=sha256(tenant.bytes + revision.bytes).digest()[:16]) if is_shared else revision


def add_demand(conn: Connection, pool: str, changes: Iterable[Change]) -> None:
    """Notes jobs that came to lanes, or left them."""
    rows = list(changes)
    if not rows:
        return
    lanes, priorities, tenants, revisions, counts, firsts = zip(*rows, strict=True)
    conn.exec_driver_sql(
        "INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued, first_id)"
        " SELECT %(pool)s, * FROM unnest(%(lanes)b::uuid[], %(priorities)b::int2[], %(tenants)b::uuid[],"
        "  %(revisions)b::uuid[], %(counts)b::int4[], %(firsts)b::uuid[])",
        {
            "pool": pool,
            "lanes": list(lanes),
            "priorities": list(priorities),
            "tenants": list(tenants),
            "revisions": list(revisions),
            "counts": list(counts),
            "firsts": list(firsts),
        },
    )


def forget_empty(conn: Connection, limit: int = 10_000) -> int:
    """Deletes sums of lanes in which nothing waits; those being written stay. Returns how many."""
    return conn.execute(
        text(
            "DELETE FROM demand_sums d USING (SELECT pool, lane, priority FROM demand_sums WHERE num_queued = 0"
            "  LIMIT :limit FOR UPDATE SKIP LOCKED) e"
            " WHERE d.pool = e.pool AND d.lane = e.lane AND d.priority = e.priority"
        ),
        {"limit": limit},
    ).rowcount


def charge(conn: Connection, pool: str, tokens: Mapping[UUID, float]) -> None:
    """Adds tokens over weight to the tenants' counters."""
    if not tokens:
        return
    conn.exec_driver_sql(
        "INSERT INTO counter_changes (pool, tenant_id, service) SELECT %(pool)s, t.id, r.tokens / t.weight"
        " FROM unnest(%(tenants)b::uuid[], %(tokens)b::float8[]) AS r(id, tokens) JOIN tenants t ON t.id = r.id",
        {"pool": pool, "tenants": list(tokens), "tokens": [float(n) for n in tokens.values()]},
    )


def array_literal(values: Sequence[int] | Sequence[float]) -> str:
    """A PostgreSQL array literal: ragged arrays cannot travel as one array parameter."""
    body = _encode_json(values)[1:-1]
    if b"null" in body:  # JSON has no infinity and no NaN
        return "{" + ",".join(map(repr, values)) + "}"
    return "{" + body.decode() + "}"
