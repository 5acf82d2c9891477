"""Transactions that outlive PostgreSQL's absences: which errors pass, how long to wait, and one log line an outage.

Knows no statement and no table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy.exc
import structlog
from sqlalchemy import Connection

from medley.db.connections import make_engine, transaction

# Lost connections, deadlocks, timeouts, shutdowns: all pass. A fault of the data is none of these. An InternalError is
# what a process hears that was frozen in a transaction, and one that met a server which is not yet writable.
Unreachable = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.InternalError,
    sqlalchemy.exc.TimeoutError,
)

MAX_WAIT_S = 2.0
IDLE_IN_TRANSACTION_MS = 10_000  # a frozen shell holds its batches' rows no longer

T = TypeVar("T")
log = structlog.get_logger()


class Transactions:
    """Transactions on the worker's database. Each thread uses one connection at a time."""

    def __init__(self, url: str, *, num_threads: int) -> None:
        self._engine = make_engine(
            url, name="worker", pool_size=num_threads, idle_in_transaction_ms=IDLE_IN_TRANSACTION_MS
        )

    def run(self, work: Callable[[Connection], T]) -> T:
        """`work` in one transaction. Raises one of `Unreachable` for what passes."""
        with transaction(self._engine) as connection:
            return work(connection)

    def insist(self, doing: str, work: Callable[[Connection], T]) -> T:
        """`work` in one transaction, again and again until PostgreSQL has taken it.

        A commit whose answer was lost is repeated: `work` must be harmless then, as fenced writes are.
        """
        wait_s = 0.05
        outage = Outage(doing)
        while True:
            try:
                result = self.run(work)
            except Unreachable as error:
                outage.begin(error)
                time.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(MAX_WAIT_S, 2 * wait_s)
            else:
                outage.end()
                return result


class Outage:
    """Says once that the database cannot be reached while `doing` something, and once that it is back."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._began_s: float | None = None

    def begin(self, error: Exception) -> None:
        if self._began_s is None:
            self._began_s = time.monotonic()
            cause = getattr(error, "orig", None) or error
            log.warning("database.unreachable", doing=self._doing, error=type(cause).__name__)

    def end(self) -> None:
        if self._began_s is not None:
            log.info("database.reached", doing=self._doing, after_s=round(time.monotonic() - self._began_s, 2))
            self._began_s = None
