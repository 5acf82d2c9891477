"""Batches: opened, locked, read and listed. What they hold is made by `new_jobs` and read by `results`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, TextClause, text

LOW, NORMAL, HIGH = 0, 1, 2  # priority classes
PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}


class TenantClosing(Exception):
    """The tenant is to be deleted: it makes nothing any more."""


@dataclass(frozen=True)
class NewBatch:
    id: UUID
    tenant: UUID
    pool: str
    name: str | None = None
    priority: int = NORMAL
    deadline_at: datetime | None = None
    is_single: bool = False  # a job by itself


def open_batch(conn: Connection, batch: NewBatch, *, total: int = 0) -> None:
    """Writes the batch row. `new_jobs` adds jobs, `close_batch` fixes the total; all in one transaction.

    Raises TenantClosing.
    """
    opened = conn.execute(
        text(
            "INSERT INTO batches (id, tenant_id, pool, name, priority, deadline_at, total, is_single)"
            " SELECT :id, t.id, :pool, :name, :priority, :deadline_at, :total, :is_single FROM tenants t"
            " WHERE t.id = :tenant AND t.delete_requested_at IS NULL"
        ),
        {
            "id": batch.id,
            "tenant": batch.tenant,
            "pool": batch.pool,
            "name": batch.name,
            "priority": batch.priority,
            "deadline_at": batch.deadline_at,
            "total": total,
            "is_single": batch.is_single,
        },
    )
    if opened.rowcount == 0:
        raise TenantClosing


def deadline_in(conn: Connection, seconds: float) -> datetime:
    """The time that is `seconds` from now on the database's clock."""
    statement = text("SELECT clock_timestamp() + make_interval(secs => :seconds)")
    deadline: datetime = conn.execute(statement, {"seconds": float(seconds)}).scalar_one()
    return deadline


def end_after(conn: Connection, batch: UUID, seconds: float) -> None:
    """Gives a batch without jobs its deadline: `seconds` after its creation, exactly, as clients reckon."""
    statement = text("UPDATE batches SET deadline_at = created_at + make_interval(secs => :seconds) WHERE id = :id")
    conn.execute(statement, {"id": batch, "seconds": float(seconds)})


def close_batch(conn: Connection, batch: UUID, total: int) -> None:
    conn.execute(text("UPDATE batches SET total = :total WHERE id = :id"), {"id": batch, "total": total})


def lock_batches(conn: Connection, batches: Iterable[UUID]) -> None:
    """Locks batch rows in id order; every writer of a job's state beyond a claim holds its batch."""
    ids = list(set(batches))
    if ids:
        conn.exec_driver_sql(
            "SELECT FROM batches WHERE id = ANY(%(ids)b::uuid[]) ORDER BY id FOR NO KEY UPDATE", {"ids": ids}
        )


def lock_batches_of(conn: Connection, jobs: Sequence[UUID]) -> None:
    """Locks the batches of `jobs`, in id order."""
    conn.exec_driver_sql(
        "SELECT FROM batches WHERE id IN (SELECT batch_id FROM jobs WHERE id = ANY(%(jobs)b::uuid[]))"
        " ORDER BY id FOR NO KEY UPDATE",
        {"jobs": list(jobs)},
    )


def read_batch(conn: Connection, batch: UUID) -> Row[Any] | None:
    """The batch's row, with its sweep's (`sweep_name`, `num_expanded`, ... null where it is none)."""
    return conn.execute(_READ_BATCHES.format_where("b.id = :id"), {"id": batch}).one_or_none()


def list_batches(conn: Connection, *, before: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """The caller's batches, newest first."""
    statement = _READ_BATCHES.format_where(
        "(CAST(:before AS uuid) IS NULL OR b.id < CAST(:before AS uuid)) ORDER BY b.id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"before": before, "limit": limit}).all()


def list_sweeps(conn: Connection, *, before: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """The caller's batches that are sweeps, newest first."""
    statement = _READ_BATCHES.format_where(
        "s.id IS NOT NULL AND (CAST(:before AS uuid) IS NULL OR b.id < :before) ORDER BY b.id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"before": before, "limit": limit}).all()


class Select:
    """A SELECT whose WHERE clause is one of its module's constants."""

    def __init__(self, head: str) -> None:
        self._head = head
        self._made: dict[str, TextClause] = {}

    def format_where(self, where: str) -> TextClause:
        if where not in self._made:
            self._made[where] = text(f"{self._head} WHERE {where}")
        return self._made[where]


_READ_BATCHES = Select(
    "SELECT b.*, s.name AS sweep_name, s.num_prompts, s.num_columns, s.num_expanded,"
    " clock_timestamp() AS read_at, f.ends_at AS expected_at, f.is_late"
    " FROM batches b LEFT JOIN sweeps s ON s.id = b.id"
    " LEFT JOIN batch_forecasts f ON f.batch_id = b.id AND b.finished_at IS NULL"
)
