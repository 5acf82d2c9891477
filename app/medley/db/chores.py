"""Which chores of a pool's leader are due: one read without a lock, so that an idle tick writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True)
class Due:
    """What waits to be done; each field is the chore's function in `medley.db`."""

    at_s: float  # the database's time, Unix seconds
    mark_gone: bool  # a worker's lease has lapsed
    reclaim: bool  # a gone worker still has jobs
    expire: bool  # a queued job is past its deadline
    judge: bool  # an open batch has a deadline
    expand: bool  # a sweep is to be rung
    end_revoked: bool  # jobs wait for an adapter that is shared no longer
    deliver: bool  # a webhook's event is to be rung


# statement_timestamp() holds still, so it can be looked up in an index: beside clock_timestamp() each look would read
# every deadline there is (measured: 0.3 s for 600,000).
_DUE = text(
    "SELECT extract(epoch FROM statement_timestamp())::float8 AS at_s,"
    # From the last look on: each renewal leaves a row version of an older time behind.
    " EXISTS (SELECT FROM workers WHERE pool = :pool AND state <> 'gone' AND lease_until <= statement_timestamp()"
    "  AND lease_until > to_timestamp(:lapsed_since)) AS mark_gone,"
    # Worker by worker: a join may look through all that is leased, which is most of a large fleet's rows.
    " EXISTS (SELECT FROM workers w CROSS JOIN LATERAL"
    "  (SELECT FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased' LIMIT 1) h"
    "  WHERE w.pool = :pool AND w.state = 'gone') AS reclaim,"
    " EXISTS (SELECT FROM jobs WHERE state = 'queued' AND deadline_at IS NOT NULL"
    "  AND deadline_at <= statement_timestamp()) AS expire,"
    " EXISTS (SELECT FROM batches WHERE pool = :pool AND finished_at IS NULL AND deadline_at IS NOT NULL) AS judge,"
    " EXISTS (SELECT FROM sweeps WHERE expand_due_at IS NOT NULL AND expand_due_at <= clock_timestamp()) AS expand,"
    " EXISTS (SELECT FROM unnest(CAST(:tenants AS uuid[]), CAST(:revisions AS uuid[])) AS d(tenant, revision)"
    "  WHERE NOT medley_may_use(d.tenant, d.revision)) AS end_revoked,"
    " EXISTS (SELECT FROM webhook_deliveries WHERE due_at <= statement_timestamp()"
    "  AND (rung_at IS NULL OR rung_at < due_at)) AS deliver"
)


def read_due(conn: Connection, pool: str, shared: Sequence[tuple[UUID, UUID]] = (), lapsed_since: float = 0.0) -> Due:
    """The chores that have something to do now.

    shared: (tenant, revision) of what waits for adapters of other tenants. lapsed_since: no lease lapsed before that
    is not marked; Unix seconds.
    """
    parameters = {
        "pool": pool,
        "tenants": [tenant for tenant, _ in shared],
        "revisions": [revision for _, revision in shared],
        "lapsed_since": lapsed_since,
    }
    return Due(**conn.execute(_DUE, parameters).one()._mapping)
