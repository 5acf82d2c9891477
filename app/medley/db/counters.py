"""The tenants' counters as the dispatcher lifts them, and the weights that they are charged by.

`medley.db.demand.charge` adds to them, `medley.db.changes` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
from sqlalchemy import Connection


@dataclass(frozen=True)
class Standing:
    """A tenant's new standing: its counter is raised by `raised`."""

    tenant: UUID
    raised: float
    is_backlogged: bool


_READ_WEIGHTS = (
    "SELECT coalesce(json_agg(json_build_array(id, weight)), '[]')::text FROM tenants WHERE id = ANY(%(ids)b::uuid[])"
)
_weights_decoder = msgspec.json.Decoder(list[tuple[UUID, float]])


def read_weights(conn: Connection, tenants: Iterable[UUID]) -> dict[UUID, float]:
    """The weights of those of `tenants` that are there."""
    document = conn.exec_driver_sql(_READ_WEIGHTS, {"ids": list(tenants)}).scalar_one()
    return dict(_weights_decoder.decode(document))


# What is raised is a change like any other: whoever follows them reads it.
_WRITE = """
WITH r AS (
    SELECT r.* FROM unnest(%(tenants)b::uuid[], %(raised)b::float8[], %(flags)b::bool[]) AS r(tenant, raised, flag)
    JOIN tenants t ON t.id = r.tenant
), raised AS (
    INSERT INTO counter_changes (pool, tenant_id, service) SELECT %(pool)s, tenant, raised FROM r WHERE raised <> 0
)
INSERT INTO counter_sums AS c (pool, tenant_id, is_backlogged) SELECT %(pool)s, tenant, flag FROM r ORDER BY tenant
ON CONFLICT (pool, tenant_id) DO UPDATE SET is_backlogged = excluded.is_backlogged
"""


def write_standings(conn: Connection, pool: str, standings: Sequence[Standing]) -> None:
    """Lifts counters and notes who is backlogged; who is gone is left out. The caller holds its term."""
    if not standings:
        return
    conn.exec_driver_sql(
        _WRITE,
        {
            "pool": pool,
            "tenants": [s.tenant for s in standings],
            "raised": [float(s.raised) for s in standings],
            "flags": [s.is_backlogged for s in standings],
        },
    )
