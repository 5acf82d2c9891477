"""Changes of what shadows the queue, as the leader follows them: each read once, then folded into the sums.

A change names the transaction that wrote it. What a reader has not seen yet is what its last snapshot did not show:
written by transactions that began later, or were running then. So a look costs what is new, whatever dead rows an old
snapshot keeps, and misses none that commits late. Only the leader folds, and only what it has read: the sum of both
never changes by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection

from medley.db.connections import plan_each
from medley.db.demand import Change

FOLD_LIMIT = 10_000  # rows of one transaction: some tens of milliseconds, and far from a term on a busy machine


@dataclass(frozen=True)
class Horizon:
    """What a snapshot shows: transactions below `end` that are not `running`; all below `begin` had ended."""

    begin: int
    end: int
    running: Sequence[int]

    @classmethod
    def of(cls, snapshot: str) -> Horizon:
        """snapshot: PostgreSQL's text, such as 10:20:10,14."""
        begin, end, running = snapshot.split(":")
        return cls(int(begin), int(end), [int(xact) for xact in running.split(",") if xact])


class Total(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tenant's service in one pool, or what was added to it; is_backlogged: its jobs were waiting."""

    tenant: UUID
    service: float
    is_backlogged: bool = False


class News(NamedTuple):
    """What a look has found: everything, or what came since the last one."""

    horizon: Horizon
    demand: list[Change]
    counters: list[Total]


_demand_decoder = msgspec.json.Decoder(list[Change])
_counters_decoder = msgspec.json.Decoder(list[Total])

_SUMMED = """
SELECT pg_current_snapshot()::text, (
    SELECT coalesce(json_agg(json_build_array(lane, priority, tenant_id, revision_id, n, first)), '[]')::text FROM (
        SELECT lane, priority, tenant_id, revision_id, sum(num_queued) AS n, min(first_id::text) AS first
        FROM ({demand}) d GROUP BY lane, priority, tenant_id, revision_id) d
), (
    SELECT coalesce(json_agg(json_build_array(tenant_id, service, is_backlogged)), '[]')::text FROM (
        SELECT tenant_id, sum(service) AS service, bool_or(is_backlogged) AS is_backlogged
        FROM ({counters}) c GROUP BY tenant_id) c
)
"""
_DEMAND = "SELECT lane, priority, tenant_id, revision_id, num_queued, first_id FROM demand_changes"
_COUNTERS = "SELECT tenant_id, service, false AS is_backlogged FROM counter_changes"
_LATER = " WHERE pool = %(pool)s AND xact >= %(end)s"
_RUNNING = " WHERE pool = %(pool)s AND xact = ANY(%(running)b::int8[])"
_READ_SINCE = _SUMMED.format(
    demand=f"{_DEMAND}{_LATER} UNION ALL {_DEMAND}{_RUNNING}",
    counters=f"{_COUNTERS}{_LATER} UNION ALL {_COUNTERS}{_RUNNING}",
)
_UNFOLDED = " WHERE pool = %(pool)s AND xact >= %(begin)s"
_READ_WHOLE = _SUMMED.format(
    demand="SELECT lane, priority, tenant_id, revision_id, num_queued, NULL::uuid AS first_id FROM demand_sums"
    f" WHERE pool = %(pool)s UNION ALL {_DEMAND}{_UNFOLDED}",
    counters="SELECT tenant_id, service, is_backlogged FROM counter_sums WHERE pool = %(pool)s"
    f" UNION ALL {_COUNTERS}{_UNFOLDED}",
)


def read_whole(conn: Connection, pool: str, begin: int = 0) -> News:
    """All that the pool's sums and changes come to. begin: changes of transactions below it have been folded."""
    return _news(conn, _READ_WHOLE, {"pool": pool, "begin": begin})


def read_since(conn: Connection, pool: str, seen: Horizon) -> News:
    """The changes that `seen` did not show; in a transaction that has written none."""
    return _news(conn, _READ_SINCE, {"pool": pool, "end": seen.end, "running": list(seen.running)})


def _news(conn: Connection, statement: str, parameters: dict[str, object]) -> News:
    snapshot, demand, counters = conn.exec_driver_sql(statement, parameters).one()
    return News(Horizon.of(snapshot), _demand_decoder.decode(demand), _counters_decoder.decode(counters))


_FOLD = """
WITH gone AS (
    DELETE FROM {changes} WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM {changes} WHERE pool = %(pool)s AND xact >= %(begin)s AND xact < %(end)s
            AND xact <> ALL(%(running)b::int8[])
        ORDER BY xact LIMIT %(limit)s))
    RETURNING *
), folded AS (
    {fold}
)
SELECT count(*), max(xact) FROM gone
"""
_FOLD_DEMAND = _FOLD.format(
    changes="demand_changes",
    fold="""INSERT INTO demand_sums AS s (pool, lane, priority, tenant_id, revision_id, num_queued)
    SELECT pool, lane, priority, tenant_id, revision_id, sum(num_queued) FROM gone
    GROUP BY pool, lane, priority, tenant_id, revision_id HAVING sum(num_queued) <> 0 ORDER BY pool, lane, priority
    ON CONFLICT (pool, lane, priority) DO UPDATE SET num_queued = s.num_queued + excluded.num_queued""",
)
# A tenant that is being erased has no sum any more.
_FOLD_COUNTERS = _FOLD.format(
    changes="counter_changes",
    fold="""INSERT INTO counter_sums AS s (pool, tenant_id, service)
    SELECT g.pool, t.id, sum(g.service) FROM gone g JOIN tenants t ON t.id = g.tenant_id GROUP BY g.pool, t.id
    ORDER BY g.pool, t.id
    ON CONFLICT (pool, tenant_id) DO UPDATE SET service = s.service + excluded.service""",
)


@dataclass
class Folding:
    """How far the changes that `seen` shows have been folded: by table, all of transactions below this one."""

    seen: Horizon
    demand: int
    counters: int


def fold(conn: Connection, pool: str, folding: Folding, limit: int = FOLD_LIMIT) -> bool:
    """Folds up to `limit` changes of each table, and moves `folding` on. Returns whether none is left.

    The caller holds its term, and has read all that `folding.seen` shows.
    """
    plan_each(conn)
    num_demand, folding.demand = _fold(conn, _FOLD_DEMAND, pool, folding.seen, folding.demand, limit)
    num_counters, folding.counters = _fold(conn, _FOLD_COUNTERS, pool, folding.seen, folding.counters, limit)
    return num_demand < limit and num_counters < limit


def _fold(conn: Connection, statement: str, pool: str, seen: Horizon, begin: int, limit: int) -> tuple[int, int]:
    parameters = {"pool": pool, "begin": begin, "end": seen.end, "running": list(seen.running), "limit": limit}
    num, last = conn.exec_driver_sql(statement, parameters).one()
    return num, begin if last is None else last


# A database that comes from a backup counts its transactions anew: changes of before would seem to be of later ones.
_ADOPT = """
UPDATE {table} SET xact = pg_current_xact_id()::text::bigint
WHERE pool = %(pool)s AND xact >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""


def adopt(conn: Connection, pool: str) -> None:
    """Makes changes that a backup brought this database's own. The caller holds its term, and has read none yet."""
    for table in ("demand_changes", "counter_changes"):
        conn.exec_driver_sql(_ADOPT.format(table=table), {"pool": pool})
