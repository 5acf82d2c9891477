"""The pool's chores: leases that lapsed, deadlines, what was revoked, forecasts, and rings for what tasks are to do.

What is due is read in one query each tick; each chore is done piece by piece in the leader's term, for no longer than
a tick has time, so that plans go on beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from medley.db import chores, flags, grants, sweeps, webhooks, workers
from medley.db import forecasts as forecasts_db
from medley.db.batches import HIGH
from medley.db.connections import plan_each, transaction
from medley.dispatcher.bookkeeper import Bookkeeper
from medley.dispatcher.forecasts import OpenBatch, forecast, judge
from medley.dispatcher.lead import Lead
from medley.rings import DELIVER_TASK, EXPAND_TASK, MAINTAIN_TASK, Ringer

CLOCK_MARGIN_S = 1.0  # by less than this the database's clock may be set back unnoticed
CHORE_S = 0.5  # of a long chore in one tick: it outlasts no term, and plans go on beside it
FORECAST_EVERY_S = 5.0
KEEP_FORECASTS_S = 60.0  # that are not made anew: of batches that have finished, or while nobody leads
MAINTAIN_EVERY_S = 60.0

log = structlog.get_logger()


class Housekeeping:
    """One leader's. `oldest_batch_s`: how long the oldest open batch has been waiting, at the last forecast."""

    def __init__(
        self, engine: Engine, pool: str, lead: Lead, keeper: Bookkeeper, ringer: Ringer, clock: Callable[[], float]
    ) -> None:
        self.oldest_batch_s = 0.0
        self._engine, self._pool, self._lead = engine, pool, lead
        self._keeper, self._ringer, self._clock = keeper, ringer, clock
        self._lapsed_since = 0.0  # leases that lapsed before are marked; Unix time of the database
        self._maintain_due_at = self._forecast_due_at = clock()

    def read_due(self) -> chores.Due:
        """What is due now."""
        with transaction(self._engine) as conn:
            plan_each(conn)
            return chores.read_due(conn, self._pool, self._keeper.books.shared(), self._lapsed_since)

    def do(self, due: chores.Due, jobs_per_s: float) -> None:
        """Does it. jobs_per_s: of the whole fleet, for forecasts. Raises TermLost, DBAPIError."""
        if due.mark_gone:
            self._chore("mark_gone", self._mark_gone)
        else:
            self._lapsed_since = due.at_s - CLOCK_MARGIN_S
        if due.mark_gone or due.reclaim:
            self._chore("reclaim", self._reclaim)
        if due.expire:
            self._chore("expire", self._expire)
        if due.judge or self._clock() >= self._forecast_due_at:
            self._chore("forecast", lambda: self._forecast(jobs_per_s))
        if due.end_revoked:
            self._chore("end_revoked", self._end_revoked)
        if due.expand:
            self._chore("expand", self._ring_expansions)
        if due.deliver:
            self._chore("deliver", self._ring_deliveries)
        self._chore("fold", self._fold)
        if self._clock() >= self._maintain_due_at:
            self._ringer.send_task(MAINTAIN_TASK)
            self._maintain_due_at = self._clock() + MAINTAIN_EVERY_S

    def _chore(self, name: str, do: Callable[[], object]) -> None:
        """Does a chore. One that waits for another's lock is left for the next tick and stops no plan."""
        try:
            do()
        except OperationalError as error:
            if error.connection_invalidated:
                raise
            log.warning("chore.failed", chore=name, error=type(error.orig).__name__)

    def _mark_gone(self) -> None:
        for worker in self._lead.write(lambda conn: workers.mark_gone(conn, self._pool)):
            log.warning("worker.gone", worker=worker.hex)

    def _reclaim(self) -> None:
        until = self._clock() + CHORE_S
        while num_jobs := self._lead.write(lambda conn: workers.reclaim(conn, self._pool)):
            log.info("jobs.reclaimed", num_jobs=num_jobs)
            if self._clock() >= until:
                return

    def _fold(self) -> None:
        until = self._clock() + CHORE_S
        self._keeper.fold(self._lead.write, self._clock(), lambda: self._clock() < until)

    def _expire(self) -> None:
        self._end("jobs.expired", lambda: self._lead.write(flags.expire_queued))

    def _end_revoked(self) -> None:
        self._end("jobs.revoked", lambda: self._lead.write(lambda conn: grants.end_revoked(conn, self._pool)))

    def _end(self, event: str, end_some: Callable[[], Collection[UUID]]) -> None:
        """Ends jobs a piece at a time, and wakes who waits for their batches."""
        until = self._clock() + CHORE_S
        while batches := end_some():
            log.info(event, num_batches=len(batches))
            for batch in batches:
                self._ringer.ring_done(batch)
            if self._clock() >= until:
                return

    def _forecast(self, jobs_per_s: float) -> None:
        """Judges deadlines, and now and then says when open batches will be done."""
        is_due = self._clock() >= self._forecast_due_at
        with transaction(self._engine) as conn:
            rows = forecasts_db.read_open(conn, self._pool)
        if is_due:
            self._forecast_due_at = self._clock() + FORECAST_EVERY_S
            self.oldest_batch_s = max((row.age_s for row in rows), default=0.0)
        if not rows:
            return
        batches = [OpenBatch(r.id, r.tenant_id, r.weight, r.priority, r.num_left, r.due_s) for r in rows]
        dues = {batch.id: batch.due_s for batch in batches if batch.due_s is not None}
        verdict = judge(batches, jobs_per_s, HIGH)
        if verdict.hasten:
            within_s = max(dues[batch] for batch in verdict.hasten) + 1.0
            self._lead.write(lambda conn: flags.hasten(conn, within_s, verdict.hasten))
        if is_due:
            found = [(f.batch, f.ends_in_s, f.is_late) for f in forecast(batches, jobs_per_s)]
            self._lead.write(lambda conn: forecasts_db.write(conn, found, keep_s=KEEP_FORECASTS_S))

    def _ring_expansions(self) -> None:
        for sweep in self._lead.write(sweeps.due_expansions):
            self._ringer.send_task(EXPAND_TASK, sweep.hex)

    def _ring_deliveries(self) -> None:
        for delivery in self._lead.write(webhooks.due_rings):
            self._ringer.send_task(DELIVER_TASK, delivery.hex)
