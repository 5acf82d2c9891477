"""A batch's counts by lane: what it has for each adapter revision, and for the base.

Kept by the statements that keep the batch's own counts, under its lock, so that a look at a batch of a million jobs
reads as many rows as it has adapters. Within a batch the revision names the lane. `medley.db.ends` counts ends; what
a create adds is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text


@dataclass(frozen=True)
class Lane:
    """Jobs of a batch for one adapter revision (None: the base), and the adapter as it was named."""

    revision: UUID | None
    adapter: str | None
    num_jobs: int


_ADD = """
INSERT INTO batch_lanes AS l (batch_id, tenant_id, revision_id, adapter, total)
SELECT %(batch)s, %(tenant)s, r.revision, r.adapter, r.num
FROM unnest(%(revisions)b::uuid[], %(adapters)b::text[], %(nums)b::int4[]) AS r(revision, adapter, num)
ON CONFLICT (batch_id, revision_id) DO UPDATE SET total = l.total + excluded.total
"""


def add_lanes(conn: Connection, batch: UUID, tenant: UUID, lanes: Sequence[Lane]) -> None:
    """Adds jobs to the totals of a batch's lanes: of one that is being made, or is locked by the caller."""
    conn.exec_driver_sql(
        _ADD,
        {
            "batch": batch,
            "tenant": tenant,
            "revisions": [lane.revision for lane in lanes],
            "adapters": [lane.adapter for lane in lanes],
            "nums": [lane.num_jobs for lane in lanes],
        },
    )


_READ = text(
    "SELECT l.*, clock_timestamp() AS read_at, f.failures FROM batch_lanes l"
    " LEFT JOIN (SELECT coalesce(revision_id, tenant_id) AS lane,"
    "  json_object_agg(code, num_jobs ORDER BY code) AS failures FROM batch_failures"
    "  WHERE batch_id = :batch AND num_jobs > 0 GROUP BY 1) f ON f.lane = coalesce(l.revision_id, l.tenant_id)"
    " WHERE l.batch_id = :batch ORDER BY l.revision_id IS NULL, l.adapter, l.revision_id"
)


def read_lanes(conn: Connection, batch: UUID) -> Sequence[Row[Any]]:
    """The batch's lanes by adapter, the base last, each with its failures by code."""
    return conn.execute(_READ, {"batch": batch}).all()
