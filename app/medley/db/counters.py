"""The tenants' counters as the dispatcher reads and lifts them; `medley.db.demand.charge` adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
from sqlalchemy import Connection, text


class Account(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tenant in one pool: tokens of service received over its weight, and whether its jobs were waiting."""

    tenant: UUID
    service: float
    weight: float
    is_backlogged: bool


@dataclass(frozen=True)
class Standing:
    """A tenant's new standing: its counter is raised to `floor` at the least."""

    tenant: UUID
    floor: float
    is_backlogged: bool


_READ = """
SELECT coalesce(json_agg(json_build_array(t.id, coalesce(c.service, 0), t.weight, coalesce(c.is_backlogged, false))),
    '[]')::text
FROM tenants t LEFT JOIN tenant_counters c ON c.pool = %(pool)s AND c.tenant_id = t.id
WHERE t.id = ANY(%(tenants)b::uuid[]) OR t.id IN (
    SELECT b.tenant_id FROM tenant_counters b WHERE b.pool = %(pool)s AND b.is_backlogged)
"""
_accounts_decoder = msgspec.json.Decoder(list[Account])


def read_accounts(conn: Connection, pool: str, tenants: Iterable[UUID]) -> list[Account]:
    """The accounts of `tenants` (zeros for one that is new) and of all that were last seen backlogged."""
    document = conn.exec_driver_sql(_READ, {"pool": pool, "tenants": list(tenants)}).scalar_one()
    return _accounts_decoder.decode(document)


def read_top_service(conn: Connection, pool: str) -> float:
    """The most service any tenant of the pool has received."""
    top: float = conn.execute(
        text("SELECT coalesce(max(service), 0) FROM tenant_counters WHERE pool = :pool"), {"pool": pool}
    ).scalar_one()
    return top


def write_standings(conn: Connection, pool: str, standings: Sequence[Standing]) -> None:
    """Lifts counters and notes who is backlogged, in tenant order; who is gone is left out.

    The caller holds its term.
    """
    if not standings:
        return
    ordered = sorted(standings, key=lambda s: s.tenant.bytes)
    conn.exec_driver_sql(
        "INSERT INTO tenant_counters AS c (pool, tenant_id, service, is_backlogged)"
        " SELECT %(pool)s, r.tenant, r.floor, r.flag FROM"
        "  unnest(%(tenants)b::uuid[], %(floors)b::float8[], %(flags)b::bool[]) AS r(tenant, floor, flag)"
        "  JOIN tenants t ON t.id = r.tenant ORDER BY r.tenant"
        " ON CONFLICT (pool, tenant_id) DO UPDATE SET service = greatest(c.service, excluded.service),"
        "  is_backlogged = excluded.is_backlogged",
        {
            "pool": pool,
            "tenants": [s.tenant for s in ordered],
            "floors": [float(s.floor) for s in ordered],
            "flags": [s.is_backlogged for s in ordered],
        },
    )
