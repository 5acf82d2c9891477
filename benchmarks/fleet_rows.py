"""A large fleet as rows: tenants, adapters, workers, queues, and the bare claims that are the floor of a dispatcher.

It writes what the service's own statements would, in bulk: jobs without inputs, since nobody reads them here.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Engine, text

from medley.db import workers
from medley.db.batches import lock_batches
from medley.db.connections import allow_minutes, make_engine, transaction
from medley.spec.ids import uuid7, uuid7s

MAX_NUM_SEQS = 256
LEASE_S = 120.0  # none lapses while the machine is busy, or before a loader has begun
EST_TOKENS = 128  # of a job: 64 in, 32 out
NUM_TILES, ADAPTER_TILES, ADAPTER_BYTES = 512, 14, 80_000_000
CHUNK = 20_000


class Lane(msgspec.Struct, frozen=True):
    """One adapter's queue in one pool; a tenant's jobs are one batch a pool."""

    tenant: UUID
    revision: UUID
    batch: UUID


@dataclass(frozen=True)
class Pool:
    name: str
    lanes: list[Lane]
    workers: list[UUID]


def make_tenants(owner: Engine, num_tenants: int, adapters_each: int) -> list[tuple[UUID, UUID]]:
    """(tenant, revision) of each adapter."""
    tenants = [(uuid7(), f"tenant-{i}") for i in range(num_tenants)]
    adapters = [(uuid7(), tenant, f"adapter-{k}") for tenant, _ in tenants for k in range(adapters_each)]
    revisions = [(uuid7(), tenant, adapter, f"{i:064x}") for i, (adapter, tenant, _) in enumerate(adapters)]
    with transaction(owner) as conn:
        _insert(conn, "tenants (id, name)", "uuid text", tenants)
        _insert(conn, "adapters (id, tenant_id, name)", "uuid uuid text", adapters)
        _insert(
            conn,
            "adapter_revisions (id, tenant_id, adapter_id, digest, max_rank, num_tiles, size_bytes)",
            "uuid uuid uuid text",
            revisions,
            f"16, {ADAPTER_TILES}, {ADAPTER_BYTES}",
        )
        _insert(conn, "tenant_usage (tenant_id, queued_jobs, queued_bytes)", "uuid", [(t,) for t, _ in tenants], "0, 0")
    return [(tenant, revision) for revision, tenant, _, _ in revisions]


def make_pool(work: Engine, owner: Engine, name: str, adapters: list[tuple[UUID, UUID]], num_workers: int) -> Pool:
    """Empty queues and active workers."""
    batches = {tenant: uuid7() for tenant, _ in adapters}
    lanes = [Lane(tenant, revision, batches[tenant]) for tenant, revision in adapters]
    with transaction(owner) as conn:
        rows = [(batch, tenant) for tenant, batch in batches.items()]
        _insert(conn, "batches (id, tenant_id, pool, total)", "uuid uuid", rows, f"'{name}', 0")
        each = [(lane.batch, lane.tenant, lane.revision) for lane in lanes]
        _insert(conn, "batch_lanes (batch_id, tenant_id, revision_id, total)", "uuid uuid uuid", each, "0")
    pool = Pool(name, lanes, uuid7s(num_workers))
    with transaction(work) as conn:
        for worker in pool.workers:
            room = workers.Room(MAX_NUM_SEQS)
            active = workers.WorkerState.ACTIVE
            workers.register(conn, worker, pool=name, host="rows", pid=1, room=room, lease_s=LEASE_S, desired=active)
    return pool


_ENQUEUE = """
WITH wanted AS (
    SELECT * FROM unnest(%(tenants)b::uuid[], %(revisions)b::uuid[], %(batches)b::uuid[], %(counts)b::int4[])
        AS w(tenant, revision, batch, n)
), counted AS (
    UPDATE batches b SET total = b.total + w.n FROM (SELECT batch, sum(n) AS n FROM wanted GROUP BY 1) w
    WHERE b.id = w.batch RETURNING 1
), made AS (
    INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, priority, est_tokens)
    SELECT uuidv7(), tenant, batch, %(pool)s, revision, 1, %(est)s FROM wanted, generate_series(1, n)
        WHERE (SELECT count(*) FROM counted) >= 0
), laned AS (
    UPDATE batch_lanes l SET total = l.total + w.n FROM wanted w
    WHERE l.batch_id = w.batch AND l.revision_id = w.revision
)
INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued, first_id)
SELECT %(pool)s, revision, 1, tenant, revision, n, %(first)s FROM wanted
"""


def enqueue(conn: Connection, pool: Pool, lanes: list[Lane], num_each: int) -> None:
    """Adds jobs to lanes, with all that shadows the queue."""
    lock_batches(conn, [lane.batch for lane in lanes])
    conn.exec_driver_sql(
        _ENQUEUE,
        {
            "pool": pool.name,
            "first": uuid7(),
            "est": EST_TOKENS,
            "tenants": [lane.tenant for lane in lanes],
            "revisions": [lane.revision for lane in lanes],
            "batches": [lane.batch for lane in lanes],
            "counts": [num_each] * len(lanes),
        },
    )


def fill(work: Engine, pool: Pool, num_jobs: int) -> None:
    """Queues `num_jobs`, as many in each lane, in parts as batches would come."""
    each = num_jobs // len(pool.lanes)
    at_once = max(1, CHUNK // len(pool.lanes))
    while each > 0:
        with transaction(work) as conn:
            enqueue(conn, pool, pool.lanes, min(each, at_once))
        each -= at_once


def revive(work: Engine, pool: str) -> None:
    """New leases for all workers: nobody renewed them while no loader ran."""
    with transaction(work) as conn:
        conn.execute(
            text("UPDATE workers SET lease_until = clock_timestamp() + make_interval(secs => :s) WHERE pool = :pool"),
            {"s": LEASE_S, "pool": pool},
        )


def num_living(conn: Connection, pool: str) -> int:
    statement = text("SELECT count(*) FROM workers WHERE pool = :pool AND state <> 'gone'")
    return int(conn.execute(statement, {"pool": pool}).scalar_one())


def num_leased(conn: Connection, pool: str) -> int:
    """Jobs that the pool's workers hold."""
    statement = text(
        "SELECT count(*) FROM jobs j JOIN workers w ON w.id = j.worker_id AND j.state = 'leased' WHERE w.pool = :pool"
    )
    return int(conn.execute(statement, {"pool": pool}).scalar_one())


def num_queued(conn: Connection, pool: str) -> int:
    statement = text("SELECT coalesce(sum(num_queued), 0) FROM demand WHERE pool = :pool")
    return int(conn.execute(statement, {"pool": pool}).scalar_one())


def end_leased(work: Engine, pool: str) -> None:
    """Ends what is leased, between two measurements: the fleet has all its room again."""
    with transaction(work) as conn:
        allow_minutes(conn)
        conn.execute(
            text(
                "UPDATE jobs j SET state = 'cancelled', worker_id = NULL, finished_at = clock_timestamp()"
                " FROM workers w WHERE w.pool = :pool AND j.worker_id = w.id AND j.state = 'leased'"
            ),
            {"pool": pool},
        )


# What a claim and a completion leave behind: a dead row, with its entry at the head of its lane's queue, and another
# in what its worker holds.
_AGE = """
WITH want AS (SELECT DISTINCT lane FROM demand WHERE pool = %(pool)s), picked AS (
    SELECT q.id, row_number() OVER () AS k FROM want w CROSS JOIN LATERAL (
        SELECT j.id FROM jobs j WHERE j.pool = %(pool)s AND j.lane = w.lane AND j.state = 'queued' AND NOT j.is_held
        ORDER BY j.priority DESC, j.id LIMIT %(each)s FOR UPDATE SKIP LOCKED) q
)
UPDATE jobs j SET state = 'leased', attempt = 1, leased_at = clock_timestamp(),
    worker_id = (%(workers)b::uuid[])[1 + k %% %(num_workers)s]
FROM picked p WHERE j.id = p.id
"""
_AGE_DEMAND = """
INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued)
SELECT pool, lane, priority, tenant_id, revision_id, -%(each)s FROM demand WHERE pool = %(pool)s
"""
_AGE_COUNTERS = """
INSERT INTO counter_changes (pool, tenant_id, service)
SELECT pool, tenant_id, 0 FROM tenant_counters, generate_series(1, %(each)s) WHERE pool = %(pool)s
"""


def age(work: Engine, pool: Pool, num_jobs: int) -> None:
    """Claims and ends `num_jobs` in bulk, the queue refilled: what they leave stays while a snapshot is open."""
    each = max(1, CHUNK // len(pool.lanes))
    num_tenants = len({lane.tenant for lane in pool.lanes})
    for _ in range(max(1, num_jobs // (each * len(pool.lanes)))):
        with transaction(work) as conn:
            enqueue(conn, pool, pool.lanes, each)
        with transaction(work) as conn:
            allow_minutes(conn)
            holders = random.Random(each).sample(pool.workers, len(pool.workers))
            conn.exec_driver_sql(
                _AGE, {"pool": pool.name, "each": each, "workers": holders, "num_workers": len(holders)}
            )
            conn.exec_driver_sql(_AGE_DEMAND, {"pool": pool.name, "each": each})
            conn.execute(text("UPDATE workers SET lease_until = lease_until WHERE pool = :pool"), {"pool": pool.name})
        # Each completion by a worker corrects the counters of the tenants in it, which is next to one a job.
        with transaction(work) as conn:
            conn.exec_driver_sql(_AGE_COUNTERS, {"pool": pool.name, "each": each * len(pool.lanes) // num_tenants})
        end_leased(work, pool.name)


# The floor: as many jobs a transaction from the head of the queue, their lanes' demand with them. It knows no
# tenants, no turns and no workers' room.
_BARE_CLAIM = """
WITH claimed AS (
    UPDATE jobs j SET state = 'leased', worker_id = %(worker)s, attempt = attempt + 1, leased_at = clock_timestamp()
    WHERE j.id = ANY(ARRAY(SELECT id FROM jobs WHERE pool = %(pool)s AND state = 'queued' AND NOT is_held
        ORDER BY lane, priority DESC, id LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
    RETURNING j.id, j.attempt, j.lane, j.priority, j.tenant_id, j.revision_id
), counted AS (
    INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued)
    SELECT %(pool)s, lane, priority, tenant_id, revision_id, -count(*) FROM claimed GROUP BY 2, 3, 4, 5
)
SELECT id, attempt, lane, tenant_id FROM claimed
"""
# The same over as many lanes as a plan takes them from.
_BARE_CLAIM_OF_LANES = """
WITH claimed AS (
    UPDATE jobs j SET state = 'leased', worker_id = %(worker)s, attempt = attempt + 1, leased_at = clock_timestamp()
    WHERE j.id = ANY(ARRAY(SELECT q.id FROM unnest(%(lanes)b::uuid[]) AS w(lane) CROSS JOIN LATERAL (
        SELECT j.id FROM jobs j
        WHERE j.pool = %(pool)s AND j.lane = w.lane AND j.state = 'queued' AND NOT j.is_held
        ORDER BY j.priority DESC, j.id LIMIT %(each)s FOR UPDATE SKIP LOCKED) q))
    RETURNING j.id, j.attempt, j.lane, j.priority, j.tenant_id, j.revision_id
), counted AS (
    INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued)
    SELECT %(pool)s, lane, priority, tenant_id, revision_id, -count(*) FROM claimed GROUP BY 2, 3, 4, 5
)
SELECT id, attempt, lane, tenant_id FROM claimed
"""


def bare_claims(url: str, pool: Pool, num_claims: int, jobs_a_claim: int, lanes_a_claim: int) -> dict[str, Any]:
    """Claims one transaction after another on one connection, for this process and its server process to be timed.

    lanes_a_claim: 0 takes the head of the queue, whichever lanes that is.
    """
    engine = make_engine(url, name="floor", pool_size=1)
    draw, taken = random.Random(1), 0
    with transaction(engine) as conn:
        backend = conn.execute(text("SELECT pg_backend_pid()")).scalar_one()
    before, began, own = cpu_s(int(backend)), time.perf_counter(), time.process_time()
    for _ in range(num_claims):
        with transaction(engine) as conn:
            found = {"pool": pool.name, "worker": draw.choice(pool.workers)}
            if lanes_a_claim:
                lanes = [lane.revision for lane in draw.sample(pool.lanes, lanes_a_claim)]
                found |= {"lanes": lanes, "each": jobs_a_claim // lanes_a_claim}
                rows = conn.exec_driver_sql(_BARE_CLAIM_OF_LANES, found).all()
            else:
                rows = conn.exec_driver_sql(_BARE_CLAIM, found | {"limit": jobs_a_claim}).all()
        if not rows:
            raise RuntimeError("the floor's queue ran empty: give it more jobs")
        taken += len(rows)
    took_s = time.perf_counter() - began
    client_s, server_s = time.process_time() - own, cpu_s(int(backend)) - before
    engine.dispose()
    return {
        "jobs": taken,
        "jobs_s": round(taken / took_s),
        "jobs_core_s": round(taken / (client_s + server_s)),
        "postgres_share": round(server_s / (client_s + server_s), 2),
    }


def cpu_s(pid: int) -> float:
    """Processor time of a process, in seconds, since it started."""
    from pathlib import Path

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _insert(conn: Connection, table: str, kinds: str, rows: list[tuple[Any, ...]], constants: str = "") -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    arrays = ", ".join(f"%(c{i})b::{kind}[]" for i, kind in enumerate(kinds.split()))
    names = ", ".join(f"c{i}" for i in range(len(columns)))
    values = f"{names}, {constants}" if constants else names
    conn.exec_driver_sql(
        f"INSERT INTO {table} SELECT {values} FROM unnest({arrays}) AS r({names})",
        {f"c{i}": column for i, column in enumerate(columns)},
    )
