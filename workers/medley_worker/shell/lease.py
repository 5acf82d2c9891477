"""The lease: one UPDATE each quarter of its time, on a thread that does nothing else, and what it brings back.

Knows neither jobs nor engines. A lease that has lapsed is lost for good; so is this process's id.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy import Connection

from medley.db import workers
from medley.db.workers import LeaseLost, WorkerState
from medley.health import beat
from medley_worker.shell.report import Report
from medley_worker.shell.transactions import Outage, Transactions, Unreachable

RENEWALS_PER_LEASE = 4
RETRY_S = 0.25

log = structlog.get_logger()


class Lease:
    """Renews while `run` runs; whoever has something to say asks for a renewal soon."""

    def __init__(
        self,
        transactions: Transactions,
        worker: UUID,
        report: Report,
        *,
        lease_s: float,
        health_file: Path | None,
    ) -> None:
        self._transactions = transactions
        self._worker = worker
        self._report = report
        self._lease_s = lease_s
        self._health_file = health_file
        self._due = threading.Event()
        self._is_given_up = False

    def give_up(self) -> None:
        """The worker is about to leave: a renewal that finds the lease gone from now on has lost nothing.

        Its last renewal is made here, so that its row holds all that it has done.
        """
        self._is_given_up = True
        with contextlib.suppress(*Unreachable, LeaseLost):
            self._transactions.run(self._renew)

    def renew_soon(self) -> None:
        """Renew now rather than at the next turn: there is something to say, or perhaps to hear."""
        self._due.set()

    def run(self, on_desire: Callable[[WorkerState], None], on_lost: Callable[[], None]) -> None:
        """Renew until the lease is gone, on a thread of its own.

        on_desire: called with the desired state after each renewal. on_lost: called once, when the lease is lost
        that was not given up.
        """
        outage = Outage("renewing the lease")
        while True:
            self._due.clear()
            wait_s = self._lease_s / RENEWALS_PER_LEASE
            try:
                desired = self._transactions.run(self._renew)
            except Unreachable as error:
                outage.begin(error)
                wait_s = min(wait_s, RETRY_S)
            except LeaseLost:
                if self._is_given_up:
                    return
                log.error("lease.lost", worker=self._worker.hex)
                on_lost()
                return
            else:
                outage.end()
                on_desire(desired)
            beat(self._health_file)
            self._due.wait(wait_s)

    def _renew(self, conn: Connection) -> WorkerState:
        said = self._report.said()
        return workers.renew(
            conn,
            self._worker,
            lease_s=self._lease_s,
            state=said.state,
            room=said.room,
            resident=said.resident,
            stats=said.stats,
            batch=said.batch,
        )
