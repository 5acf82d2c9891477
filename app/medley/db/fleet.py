"""The fleet as its operator has it: what he holds workers to, the log of it, and what the command line shows.

A hold stands in the worker's row beside the desired state. The policy works around it, the dispatcher's own write
of a desired state passes over it, and the role that dispatchers and workers have cannot write it. It ends when it is
released, or with its worker: a process that starts again is another worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row, text


class Steer(StrEnum):
    """What an operator may say to a worker."""

    DRAIN = "drain"  # give the jobs back now, and sleep
    SLEEP = "sleep"  # take no more, and sleep once those that are there have ended
    WAKE = "wake"
    RELEASE = "release"  # back to the policy


# A worker that is to sleep and holds nothing, or is not active yet, need not wait for a plan.
_IS_IDLE = (
    "(w.state NOT IN ('active', 'draining')"
    " OR NOT EXISTS (SELECT FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased'))"
)
_HELD = {Steer.DRAIN: "asleep", Steer.SLEEP: "asleep", Steer.WAKE: "active", Steer.RELEASE: None}
_DESIRED = {
    Steer.DRAIN: "CASE WHEN w.state IN ('active', 'draining') THEN 'draining' ELSE 'asleep' END",
    Steer.SLEEP: f"CASE WHEN {_IS_IDLE} THEN 'asleep' ELSE w.desired_state END",
    Steer.WAKE: "'active'",
    Steer.RELEASE: "w.desired_state",
}


def steer(conn: Connection, worker: UUID, how: Steer, operator: str) -> Row[Any] | None:
    """Holds a worker, or releases it, and writes it to the log. As medley_owner.

    Returns (id, pool, state, desired_state, held_state) as they stand now; None where the worker is gone. Who has
    steered tells the worker to look (`rings.tell_worker`).
    """
    row = conn.execute(
        text(
            f"UPDATE workers w SET desired_state = {_DESIRED[how]},"
            f" changed_at = CASE WHEN w.desired_state <> {_DESIRED[how]} THEN clock_timestamp() ELSE changed_at END,"
            " held_state = CAST(:held AS text),"
            " held_by = CASE WHEN CAST(:held AS text) IS NOT NULL THEN :operator END,"
            " held_at = CASE WHEN CAST(:held AS text) IS NOT NULL THEN clock_timestamp() END"
            " WHERE w.id = :id AND w.state <> 'gone' AND w.lease_until > clock_timestamp()"
            " RETURNING w.id, w.pool, w.host, w.state, w.desired_state, w.held_state"
        ),
        {"id": worker, "held": _HELD[how], "operator": operator},
    ).one_or_none()
    if row is not None:
        details: Mapping[str, object] = {"host": row.host, "state": row.state, "desired_state": row.desired_state}
        conn.execute(
            text(
                "INSERT INTO fleet_log (pool, worker_id, action, operator, details)"
                " VALUES (:pool, :worker, :action, :operator, CAST(:details AS jsonb))"
            ),
            {
                "pool": row.pool,
                "worker": worker,
                "action": f"worker.{how.value}",
                "operator": operator,
                "details": msgspec.json.encode(details).decode(),
            },
        )
    return row


_FLEET = text(
    "SELECT w.*, extract(epoch FROM w.lease_until - clock_timestamp())::float8 AS lease_left_s,"
    " extract(epoch FROM clock_timestamp() - w.changed_at)::float8 AS unchanged_s,"
    " extract(epoch FROM clock_timestamp() - w.started_at)::float8 AS up_s,"
    " (SELECT count(*) FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased') AS num_leased"
    " FROM workers w WHERE (CAST(:pool AS text) IS NULL OR w.pool = :pool) AND w.state <> 'gone'"
    " ORDER BY w.pool, w.id"
)


def read_fleet(conn: Connection, pool: str | None) -> Sequence[Row[Any]]:
    """The living workers of a pool (None: of all) as their rows are, with the jobs that they hold."""
    return conn.execute(_FLEET, {"pool": pool}).all()


_QUEUES = text(
    "SELECT pool, sum(num_queued)::int8 AS num_queued FROM demand"
    " WHERE (CAST(:pool AS text) IS NULL OR pool = :pool) AND num_queued > 0 GROUP BY pool ORDER BY pool"
)


def read_queues(conn: Connection, pool: str | None) -> dict[str, int]:
    """The jobs that wait, by pool; pools in which none does are left out."""
    return {row.pool: row.num_queued for row in conn.execute(_QUEUES, {"pool": pool})}


def read_batches(conn: Connection, workers: Sequence[UUID]) -> Sequence[Row[Any]]:
    """(worker_id, batch, age_s): what these workers last said of their running batches."""
    return conn.execute(
        text(
            "SELECT worker_id, batch, extract(epoch FROM clock_timestamp() - at)::float8 AS age_s"
            " FROM worker_batches WHERE worker_id = ANY(:workers)"
        ),
        {"workers": list(workers)},
    ).all()


def read_names(conn: Connection, tenants: set[UUID], revisions: set[UUID]) -> tuple[dict[UUID, str], dict[UUID, str]]:
    """Names of tenants, and of adapters by revision (with the owner's name); those that are gone are left out."""
    named = conn.execute(text("SELECT id, name FROM tenants WHERE id = ANY(:ids)"), {"ids": list(tenants)})
    adapters = conn.execute(
        text(
            "SELECT r.id, t.name || '/' || a.name AS name FROM adapter_revisions r"
            " JOIN adapters a ON a.id = r.adapter_id JOIN tenants t ON t.id = r.tenant_id WHERE r.id = ANY(:ids)"
        ),
        {"ids": list(revisions)},
    )
    return {row.id: row.name for row in named}, {row.id: row.name for row in adapters}


def read_log(conn: Connection, pool: str | None, limit: int) -> Sequence[Row[Any]]:
    """The newest entries of the log, newest first."""
    statement = text(
        "SELECT * FROM fleet_log WHERE (CAST(:pool AS text) IS NULL OR pool = :pool) ORDER BY id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"pool": pool, "limit": limit}).all()
