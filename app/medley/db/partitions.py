"""Partitions: one for each day of jobs' inputs and results (UTC, by the time in a job's id), made ahead, dropped whole.

Knows no tenants: a partition goes when no job of its day is left in `jobs`, and `medley.db.retention` says which are.
What has no partition of its day is in the default one and works there; `make` moves it. Made and dropped by functions
of the database that run as the owner, since `medley_work` may not (see migration 0005).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from medley.spec.ids import first_id

TABLES = ("job_inputs", "job_results")
AHEAD_DAYS = 3  # made ahead: the chore may fail for as long before rows go to the default partition
MAX_STRAYS = 16  # days of the default partition that one call makes partitions for
# Others wait behind a lock that is waited for: the next call comes within a minute.
LOCK_TIMEOUT = "2s"
CHORE_LOCK = 0x70617274  # an advisory lock: one process at a time makes and drops

_DAY_S = 24 * 3600
_EPOCH = date(1970, 1, 1)
_LEAST, _PAST_ALL = UUID(int=0), UUID(int=(1 << 128) - 1)
_BOUNDS = re.compile(r"FROM \((?:MINVALUE|'(?P<first>[0-9a-f-]+)')\) TO \('(?P<past>[0-9a-f-]+)'\)")


@dataclass(frozen=True)
class Partition:
    """Holds the jobs from id `first` on, up to `past` and without it."""

    table: str
    name: str
    first: UUID
    past: UUID


_READ = text(
    "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) AS bounds FROM pg_inherits i"
    " JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = CAST(:table AS regclass)"
)


def read_partitions(conn: Connection, table: str) -> list[Partition]:
    """Those of one of `TABLES`, in order; the default one is left out."""
    found = [(row.relname, _BOUNDS.search(row.bounds)) for row in conn.execute(_READ, {"table": table})]
    partitions = [
        Partition(table, name, UUID(bounds["first"]) if bounds["first"] else _LEAST, UUID(bounds["past"]))
        for name, bounds in found
        if bounds is not None
    ]
    return sorted(partitions, key=lambda p: p.first)


def first_of(day: date) -> UUID:
    """The least id of that day."""
    return first_id((day - _EPOCH).days * _DAY_S)


def day_of(job: UUID) -> date:
    return _EPOCH + timedelta(seconds=(job.int >> 80) // 1000)


def make(conn: Connection, table: str) -> int:
    """Makes what one of `TABLES` lacks from today to `AHEAD_DAYS` on, and for days that the default partition holds.

    Returns how many. Raises OperationalError where the table is busy; then nothing was done. One table a transaction,
    as for `drop`: readers take the tables in any order, and a lock on each would meet them crosswise.
    """
    _begin(conn)
    today = _today(conn)
    return sum(_make(conn, table, day) for day in list(_missing(conn, table, today)))


def _missing(conn: Connection, table: str, today: date) -> Iterator[date]:
    partitions = read_partitions(conn, table)
    for ahead in range(AHEAD_DAYS + 1):
        day = today + timedelta(days=ahead)
        if not any(p.first <= first_of(day) < p.past for p in partitions):
            yield day
    strays = itertools.chain.from_iterable(_strays(conn, table, gap) for gap in _gaps(partitions))
    # Of a clock that is days ahead there is no end: these wait until their day has come.
    yield from itertools.islice((day for day in strays if day < today), MAX_STRAYS)


def _gaps(partitions: list[Partition]) -> Iterator[tuple[UUID, UUID]]:
    """Where rows go to the default partition."""
    firsts = [p.first for p in partitions] + [_PAST_ALL]
    for past, first in zip([_LEAST] + [p.past for p in partitions], firsts, strict=True):
        if past < first:
            yield past, first


def _strays(conn: Connection, table: str, gap: tuple[UUID, UUID]) -> Iterator[date]:
    first, past = gap
    # Bounds in a gap leave the default partition alone to be read.
    statement = text(f"SELECT job_id FROM {table} WHERE job_id >= :first AND job_id < :past ORDER BY job_id LIMIT 1")
    while (found := conn.execute(statement, {"first": first, "past": past}).scalar_one_or_none()) is not None:
        day = day_of(found)
        yield day
        first = first_of(day + timedelta(days=1))


def _make(conn: Connection, table: str, day: date) -> bool:
    statement = text("SELECT medley_make_partition(:table, :day)")
    is_new: bool = conn.execute(statement, {"table": table, "day": day}).scalar_one()
    return is_new


def drop(conn: Connection, table: str) -> list[str]:
    """Drops one table's partitions of days before today of which no job is left. Returns their names.

    Raises OperationalError where the table is busy; then nothing was done.
    """
    _begin(conn)
    today = first_of(_today(conn))
    past_ones = [p for p in read_partitions(conn, table) if p.past <= today]
    return [p.name for p in past_ones if _is_done(conn, p) and _drop(conn, p)]


def _is_done(conn: Connection, partition: Partition) -> bool:
    """A look without locks. The function looks again, under the lock on the table."""
    statement = text("SELECT NOT EXISTS (SELECT FROM jobs WHERE id >= :first AND id < :past)")
    is_done: bool = conn.execute(statement, {"first": partition.first, "past": partition.past}).scalar_one()
    return is_done


def _drop(conn: Connection, partition: Partition) -> bool:
    is_dropped: bool = conn.execute(text("SELECT medley_drop_partition(:name)"), {"name": partition.name}).scalar_one()
    return is_dropped


def _begin(conn: Connection) -> None:
    conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": CHORE_LOCK})
    conn.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))


def _today(conn: Connection) -> date:
    today: date = conn.execute(text("SELECT (statement_timestamp() AT TIME ZONE 'UTC')::date")).scalar_one()
    return today
