"""The look of each second: rows assigned to this worker that it does not hold, and held jobs that must not run on.

Now and then it also asks which of the engine's adapters are no more. This is what makes a lost message and a lost
ring harmless. It owns its thread and no state of jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from uuid import UUID

import structlog
from sqlalchemy import Connection

from medley.db.adapters import read_gone
from medley.db.ends import Result
from medley.db.flags import Flag, Flagged, flagged
from medley.db.inputs import assigned
from medley.spec.jobs import JobState
from medley.spec.wire import Abort, JobKey, Release
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import HeldJobs, Phase
from medley_worker.shell.inbox import Inbox
from medley_worker.shell.results import Results
from medley_worker.shell.transactions import Outage, Transactions, Unreachable

INTERVAL_S = 1.0
FORGET_S = 5.0  # how often the engine's adapters are held against those that there are

log = structlog.get_logger()

_ENDS = {Flag.CANCEL: JobState.CANCELLED, Flag.EXPIRE: JobState.EXPIRED}


class Watch:
    """accepts: whether the worker takes jobs now; while it does not, what is assigned to it goes back."""

    def __init__(
        self,
        transactions: Transactions,
        worker: UUID,
        inbox: Inbox,
        held: HeldJobs,
        feed: Feed,
        results: Results,
        *,
        accepts: Callable[[], bool],
    ) -> None:
        self._transactions = transactions
        self._worker = worker
        self._inbox = inbox
        self._held = held
        self._feed = feed
        self._results = results
        self._accepts = accepts
        self._forget_at = 0.0  # when adapters are looked at next, of time.monotonic()

    def run(self) -> None:
        """Look each second for ever, on a thread of its own."""
        outage = Outage("looking for missed rows and flags")
        while True:
            try:
                self.look()
                outage.end()
            except Unreachable as error:
                outage.begin(error)
            time.sleep(INTERVAL_S)

    def look(self) -> None:
        """One look. Raises `Unreachable` for what passes."""
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + FORGET_S
            self._forget()
        rows, marks = self._transactions.run(self._read)
        self._heed(marks)
        marked = {mark.job for mark in marks}
        missed = set(self._held.not_held(job for job, _ in rows)) - marked
        if self._accepts():
            self._inbox.put(missed)
            return
        keys = [JobKey(job, attempt) for job, attempt in rows if job in missed]
        self._results.give_back([key for key in keys if self._held.end(key) is Phase.WAITING])
        self._results.give_back_waiting()

    def _forget(self) -> None:
        """What a deleted tenant has left in the engine's memory goes."""
        given = self._feed.given()
        if given:
            gone = self._transactions.run(lambda conn: read_gone(conn, given))
            if num_forgotten := self._feed.forget(gone):
                log.info("adapters.forgotten", num_adapters=num_forgotten)

    def _read(self, conn: Connection) -> tuple[list[tuple[UUID, int]], list[Flagged]]:
        return assigned(conn, self._worker), flagged(conn, self._worker)

    def _heed(self, marks: Sequence[Flagged]) -> None:
        results: list[Result] = []
        aborts: list[JobKey] = []
        releases: list[JobKey] = []
        requests: list[JobKey] = []
        for mark in marks:
            key = JobKey(mark.job, mark.attempt)
            if mark.flag is Flag.RELEASE:
                phase = self._held.ask_release(key)
                if phase is not None:
                    (requests if phase is Phase.IN_ENGINE else releases).append(key)
                continue
            phase = self._held.end(key)
            if phase is not None:
                # Without text and without usage: nothing of it is delivered, so nothing is billed.
                results.append(Result(job=mark.job, attempt=mark.attempt, state=_ENDS[mark.flag]))
                if phase is Phase.IN_ENGINE:
                    aborts.append(key)
        if aborts:
            self._feed.send(Abort(tuple(aborts)))
            self._feed.offer()
        if requests:
            self._feed.send(Release(tuple(requests)))
        self._results.put(results)
        self._results.give_back(releases)
