"""The part of `medley.maintain` that keeps each tenant's days: expired batches go, partitions come and go.

Each step is a transaction of its own, so that a killed process has lost nothing: the next begins where rows say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import OperationalError

from medley.db import partitions, retention
from medley.db.connections import transaction

CHUNK = 10_000  # rows a transaction
BATCHES = 1_000  # looked at at once

T = TypeVar("T")
log = structlog.get_logger()


@dataclass
class Gone:
    """What went in one run."""

    num_jobs: int = 0
    num_batches: int = 0
    num_days_by_rows: int = 0
    partitions: list[str] = field(default_factory=list)


def keep_retention(engine: Engine) -> Gone:
    """Makes partitions ahead, removes what is kept no longer, drops partitions that are empty of jobs."""
    gone = Gone()
    for table in partitions.TABLES:
        _while_busy_later(engine, partial(partitions.make, table=table))
    _forget_expired(engine, gone)
    _forget_aged(engine)
    # Before the rows that are left: what goes whole need not go by rows.
    for table in partitions.TABLES:
        gone.partitions += _while_busy_later(engine, partial(partitions.drop, table=table)) or []
    _forget_left(engine, gone)
    return gone


def _while_busy_later(engine: Engine, act: Callable[[Connection], T]) -> T | None:
    """A step that waits for no one: where the table is busy the next run does it."""
    try:
        with transaction(engine) as conn:
            return act(conn)
    except OperationalError as error:
        if error.connection_invalidated:
            raise
        log.info("partitions.busy", error=type(error.orig).__name__)
        return None


def _forget_expired(engine: Engine, gone: Gone) -> None:
    while True:
        with transaction(engine) as conn:
            expired = retention.read_expired(conn, BATCHES)
        num_batches = 0
        for group in _groups(expired):
            gone.num_jobs += _forget_jobs(engine, group)
            with transaction(engine) as conn:
                num_batches += retention.forget_batches(conn, group)
        gone.num_batches += num_batches
        if len(expired) < BATCHES or num_batches == 0:
            return


def _groups(expired: Sequence[Row[Any]]) -> Iterator[list[UUID]]:
    """Batches of up to `CHUNK` jobs together; a larger one by itself."""
    group: list[UUID] = []
    num_jobs = 0
    for row in sorted(expired, key=lambda r: r.id):
        if group and num_jobs + row.total > CHUNK:
            yield group
            group, num_jobs = [], 0
        group.append(row.id)
        num_jobs += row.total
    if group:
        yield group


def _forget_jobs(engine: Engine, batches: list[UUID]) -> int:
    total, after = 0, None
    while True:
        with transaction(engine) as conn:
            done = retention.forget_jobs(conn, batches, after=after, limit=CHUNK)
        total, after = total + done.num_jobs, done.last
        if done.num_jobs < CHUNK:
            return total


def _forget_aged(engine: Engine) -> None:
    while True:
        with transaction(engine) as conn:
            if retention.forget_aged(conn, CHUNK) < CHUNK:
                return


def _forget_left(engine: Engine, gone: Gone) -> None:
    with transaction(engine) as conn:
        days = retention.read_left(conn)
    for left in days:
        for table in partitions.TABLES:
            after, num_rows = None, CHUNK
            while num_rows == CHUNK:
                with transaction(engine) as conn:
                    done = retention.forget_left(conn, left, table, after=after, limit=CHUNK)
                after, num_rows = done.last, done.num_jobs
        with transaction(engine) as conn:
            retention.close_left(conn, left)
        gone.num_days_by_rows += 1
