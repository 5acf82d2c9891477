"""Workers and their leases: one row a worker, renewed by one UPDATE, on the database's clock.

A lease that has lapsed is never renewed: the worker is gone, its jobs go back, and a process that wakes up later
must begin again under a new id. Ids are never reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row, text

from medley.db.queue import Holding, requeue


class WorkerState(StrEnum):
    ASLEEP = "asleep"
    WAKING = "waking"
    ACTIVE = "active"
    DRAINING = "draining"
    GONE = "gone"


class LeaseLost(Exception):
    """The worker's lease has lapsed: its jobs belong to others now. Stop, and start under a new id."""


@dataclass(frozen=True)
class Room:
    """What an engine holds at the most; zeros while it is not loaded."""

    max_num_seqs: int
    num_pages: int = 0
    page_size: int = 0
    num_tiles: int = 0


def register(
    conn: Connection,
    worker: UUID,
    *,
    pool: str,
    host: str,
    pid: int,
    room: Room,
    lease_s: float,
    desired: WorkerState = WorkerState.ASLEEP,
    version: str = "",
) -> None:
    """A new worker, asleep: its engine is loaded when the dispatcher wakes it, or now where it desires so itself."""
    conn.execute(
        text(
            "INSERT INTO workers (id, pool, host, pid, state, desired_state, lease_until, max_num_seqs, version)"
            " VALUES (:id, :pool, :host, :pid, 'asleep', :desired,"
            "  clock_timestamp() + make_interval(secs => :lease_s), :max_num_seqs, :version)"
        ),
        {
            "id": worker,
            "pool": pool,
            "host": host,
            "pid": pid,
            "lease_s": lease_s,
            "max_num_seqs": room.max_num_seqs,
            "desired": desired.value,
            "version": version,
        },
    )


_RENEW = text(
    "WITH renewed AS ("
    " UPDATE workers SET lease_until = clock_timestamp() + make_interval(secs => :lease_s), state = :state,"
    "  changed_at = CASE WHEN state <> :state THEN clock_timestamp() ELSE changed_at END,"
    "  max_num_seqs = :max_num_seqs, num_pages = :num_pages, page_size = :page_size, num_tiles = :num_tiles,"
    "  resident = :resident, stats = CAST(:stats AS jsonb)"
    " WHERE id = :id AND state <> 'gone' AND lease_until > clock_timestamp() RETURNING id, desired_state"
    "), said AS ("
    " INSERT INTO worker_batches AS b (worker_id, batch) SELECT id, CAST(:batch AS jsonb) FROM renewed"
    " WHERE CAST(:batch AS text) IS NOT NULL"
    " ON CONFLICT (worker_id) DO UPDATE SET batch = excluded.batch, at = excluded.at"
    ") SELECT desired_state FROM renewed"
)


def renew(
    conn: Connection,
    worker: UUID,
    *,
    lease_s: float,
    state: WorkerState,
    room: Room,
    resident: Sequence[UUID],
    stats: object,
    batch: object = None,
) -> WorkerState:
    """Renews the lease and reports. Returns the desired state. Raises LeaseLost where the lease has lapsed.

    batch: whose jobs run here, for the operator alone (JSON-ready); None: as it was said before.
    """
    row = conn.execute(
        _RENEW,
        {
            "id": worker,
            "lease_s": lease_s,
            "state": state.value,
            "max_num_seqs": room.max_num_seqs,
            "num_pages": room.num_pages,
            "page_size": room.page_size,
            "num_tiles": room.num_tiles,
            "resident": list(resident),
            "stats": msgspec.json.encode(stats).decode(),
            "batch": None if batch is None else msgspec.json.encode(batch).decode(),
        },
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"the lease of worker {worker} has lapsed")
    return WorkerState(row.desired_state)


# What ran on a worker that is gone runs there no more.
_GONE = "WITH gone AS (UPDATE workers SET state = 'gone', desired_state = 'gone', changed_at = clock_timestamp()"
_FORGET_BATCHES = (
    ", forgotten AS (DELETE FROM worker_batches WHERE worker_id IN (SELECT id FROM gone)) SELECT id FROM gone"
)


def leave(conn: Connection, worker: UUID) -> None:
    """The worker's own farewell, after it has released its jobs."""
    conn.execute(text(f"{_GONE} WHERE id = :id RETURNING id) {_FORGET_BATCHES}"), {"id": worker})


def desire(conn: Connection, worker: UUID, state: WorkerState) -> bool:
    """Sets the state the worker is to take; a message only rings. The caller holds its term.

    Returns whether that is new. A worker that an operator holds is told nothing but what he says.
    """
    changed = conn.execute(
        text(
            "UPDATE workers SET desired_state = :state, changed_at = clock_timestamp()"
            " WHERE id = :id AND state <> 'gone' AND desired_state <> :state AND coalesce(held_state, :state) = :state"
        ),
        {"id": worker, "state": state.value},
    )
    return changed.rowcount > 0


_READ_WORKERS = text(
    "SELECT w.*, extract(epoch FROM w.lease_until - clock_timestamp())::float8 AS lease_left_s,"
    " extract(epoch FROM clock_timestamp() - w.changed_at)::float8 AS unchanged_s,"
    " (SELECT count(*) FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased') AS num_leased"
    " FROM workers w WHERE w.pool = :pool AND w.state <> 'gone' ORDER BY w.id"
)


def read_workers(conn: Connection, pool: str) -> Sequence[Row[Any]]:
    """The pool's living workers with what they hold and how long their leases still run (seconds)."""
    return conn.execute(_READ_WORKERS, {"pool": pool}).all()


class Stand(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one living worker stands, as a plan needs it; `stats` is what it last reported."""

    id: UUID
    host: str
    pid: int
    state: WorkerState
    desired_state: WorkerState
    held_state: WorkerState | None  # by an operator
    max_num_seqs: int
    num_tiles: int
    num_leased: int
    leased_since: float  # none of its jobs was leased before: Unix time of the database
    unchanged_s: float
    stats: dict[str, Any]


CLOCK_MARGIN_S = 2.0  # by less than this a clock that was set back makes no job older than what is read

# Jobs that were leased and have ended stay in the index for as long as anybody's snapshot is older: what is known to
# have ended is not read again.
_SINCE = """
    workers w LEFT JOIN unnest(%(workers)b::uuid[], %(since)b::float8[]) AS s(id, since) ON s.id = w.id
    CROSS JOIN LATERAL to_timestamp(coalesce(s.since, 0)) AS oldest(leased_at)
"""
# Each renewal leaves a version of the row behind, whose lease ends sooner: most have lapsed and are not read.
_LIVING = "WHERE w.pool = %(pool)s AND w.state <> 'gone' AND w.lease_until > statement_timestamp()"
_READ_STANDS = f"""
SELECT coalesce(json_agg(json_build_array(w.id, w.host, w.pid, w.state, w.desired_state,
    w.held_state, w.max_num_seqs, w.num_tiles, h.num_leased,
    extract(epoch FROM coalesce(h.leased_at, statement_timestamp()))::float8 - {CLOCK_MARGIN_S},
    extract(epoch FROM clock_timestamp() - w.changed_at)::float8, w.stats) ORDER BY w.id), '[]')::text
FROM {_SINCE} CROSS JOIN LATERAL (
    SELECT count(*) AS num_leased, min(j.leased_at) AS leased_at FROM jobs j
    WHERE j.worker_id = w.id AND j.state = 'leased' AND j.leased_at >= oldest.leased_at) h
{_LIVING}
"""
_stands_decoder = msgspec.json.Decoder(list[Stand])


def read_stands(conn: Connection, pool: str, leased_since: Mapping[UUID, float]) -> list[Stand]:
    """The pool's living workers, in id order. leased_since: as the last ones said; a worker may be absent."""
    document = conn.exec_driver_sql(_READ_STANDS, {"pool": pool, **_since(leased_since)}).scalar_one()
    return _stands_decoder.decode(document)


def _since(leased_since: Mapping[UUID, float]) -> dict[str, object]:
    return {"workers": list(leased_since), "since": list(leased_since.values())}


_READ_RESIDENT = (
    "SELECT coalesce(json_agg(json_build_array(lane, worker)), '[]')::text FROM ("
    f" SELECT unnest(w.resident) AS lane, w.id AS worker FROM workers w {_LIVING}) h"
)
_READ_LEASED = f"""
SELECT coalesce(json_agg(json_build_array(h.lane, w.id)), '[]')::text
FROM {_SINCE} CROSS JOIN LATERAL (
    SELECT DISTINCT j.lane FROM jobs j
    WHERE j.worker_id = w.id AND j.state = 'leased' AND j.leased_at >= oldest.leased_at) h
{_LIVING}
"""
_pairs_decoder = msgspec.json.Decoder(list[tuple[UUID, UUID]])


def read_resident(conn: Connection, pool: str) -> list[tuple[UUID, UUID]]:
    """(adapter revision, worker) of what living workers have in device memory."""
    return _pairs_decoder.decode(conn.exec_driver_sql(_READ_RESIDENT, {"pool": pool}).scalar_one())


def read_leased_lanes(conn: Connection, pool: str, leased_since: Mapping[UUID, float]) -> list[tuple[UUID, UUID]]:
    """(lane, worker) of the jobs that living workers hold, each once. leased_since: see `read_stands`."""
    document = conn.exec_driver_sql(_READ_LEASED, {"pool": pool, **_since(leased_since)}).scalar_one()
    return _pairs_decoder.decode(document)


def mark_gone(conn: Connection, pool: str) -> list[UUID]:
    """Marks workers whose lease has lapsed. The caller holds its term."""
    statement = (
        f"{_GONE} WHERE pool = :pool AND state <> 'gone' AND lease_until <= clock_timestamp() RETURNING id)"
        f" {_FORGET_BATCHES}"
    )
    return list(conn.execute(text(statement), {"pool": pool}).scalars())


def reclaim(conn: Connection, pool: str, limit: int = 2_000) -> int:
    """Puts up to `limit` jobs of gone workers back (or to their end where one is due). Returns how many.

    The caller holds its term and repeats until 0.
    """
    rows = conn.execute(
        text(
            "SELECT j.id, j.batch_id, j.worker_id FROM workers w CROSS JOIN LATERAL"
            " (SELECT * FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased' LIMIT :limit) j"
            " WHERE w.pool = :pool AND w.state = 'gone' ORDER BY j.id LIMIT :limit"
        ),
        {"pool": pool, "limit": limit},
    ).all()
    return len(requeue(conn, [Holding(row.id, row.worker_id, row.batch_id) for row in rows]))


def forget_gone(conn: Connection, *, older_than_s: float) -> int:
    """Deletes workers that have been gone this long and hold nothing. Returns how many."""
    return conn.execute(
        text(
            "DELETE FROM workers w WHERE w.state = 'gone'"
            " AND w.changed_at < clock_timestamp() - make_interval(secs => :age)"
            " AND NOT EXISTS (SELECT FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased')"
        ),
        {"age": older_than_s},
    ).rowcount
