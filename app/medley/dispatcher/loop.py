"""The dispatcher's loop: leads by term, does the pool's chores, reads, plans, claims, rings.

It decides nothing (`policy` does) and keeps nothing that it cannot see again. Every transaction that writes begins
by holding the term, so a leader that was stopped and goes on writes nothing. A message is only a ring, sent from a
thread of its own: workers find their rows without it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

from medley.celery_app import worker_queue
from medley.config import Settings
from medley.db import adapters, changes, chores, counters, flags, grants, leaders, queue, sweeps, webhooks, workers
from medley.db import forecasts as forecasts_db
from medley.db.batches import HIGH
from medley.db.connections import make_engine, plan_each, transaction
from medley.db.workers import WorkerState
from medley.dispatcher.bookkeeper import Bookkeeper
from medley.dispatcher.forecasts import OpenBatch, forecast, judge
from medley.dispatcher.glance import Glance
from medley.dispatcher.heads import Heads, Queue
from medley.dispatcher.planner import AdapterSize, Planner, Stands, rows_that_fit
from medley.dispatcher.plans import Phase, Plan, Rules, Tenant
from medley.dispatcher.step_time import Totals
from medley.dispatcher.watchers import watchers
from medley.garbage import collect_rarely
from medley.health import beat
from medley.rings import DELIVER_TASK, EXPAND_TASK, MAINTAIN_TASK, RUN_JOBS_TASK, Bell, Ringer, pool_channel
from medley.spec.ids import uuid7

EXPECT_TASK = "medley.expect"
MAX_IDS_A_MESSAGE = 256
MAX_JOBS_A_CLAIM = 1_000  # one transaction: some tens of milliseconds
TERM_TICKS = 3  # a leader that misses this many ticks is succeeded
CLOCK_MARGIN_S = 1.0  # by less than this the database's clock may be set back unnoticed
CHORE_S = 0.5  # of a long chore in one tick: it outlasts no term, and plans go on beside it
FORECAST_EVERY_S = 5.0
KEEP_FORECASTS_S = 60.0  # that are not made anew: of batches that have finished, or while nobody leads
MAX_SIZES = 100_000  # of adapter revisions that are remembered
MAINTAIN_EVERY_S = 60.0
MIN_TURN_S = 0.02  # rings that come faster are one
MAX_BACKOFF_S = 2.0
# Others wait for the leader: it waits for no lock for long, and frozen in a transaction it soon lets go.
LOCK_TIMEOUT_MS = 2_000
IDLE_IN_TRANSACTION_MS = 5_000

_DESIRED = {
    Phase.ACTIVE: WorkerState.ACTIVE,
    Phase.DRAINING: WorkerState.DRAINING,
    Phase.ASLEEP: WorkerState.ASLEEP,
}
_HOLDS = {None: None, WorkerState.ACTIVE: Phase.ACTIVE, WorkerState.ASLEEP: Phase.ASLEEP}

T = TypeVar("T")
log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Dispatches until SIGTERM or SIGINT, then resigns and returns. PostgreSQL and Redis may come and go."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    engine = make_engine(
        settings.database_url,
        name="dispatcher",
        pool_size=1,
        lock_timeout_ms=LOCK_TIMEOUT_MS,
        idle_in_transaction_ms=IDLE_IN_TRANSACTION_MS,
    )
    ringer = Ringer(settings.redis_url)
    bell = Bell(settings.redis_url, pool_channel(settings.pool))
    rules = Rules(look_s=settings.tick_s, scale_wait_s=settings.scale.wait_s)
    dispatcher = Dispatcher(engine, settings, ringer, rules=rules)
    try:
        collect_rarely()
        with watchers(settings, dispatcher, max_age_s=TERM_TICKS * settings.tick_s):
            _run_until(stop, dispatcher, bell, settings)
            dispatcher.resign()
    finally:
        bell.close()
        ringer.close()
        engine.dispose()


def _run_until(stop: threading.Event, dispatcher: Dispatcher, bell: Bell, settings: Settings) -> None:
    num_failures = 0
    while not stop.is_set():
        began = time.monotonic()
        try:
            look_in_s = dispatcher.tick()
            num_failures = 0
        except (OperationalError, InternalError) as error:
            num_failures += 1
            backoff_s = min(MAX_BACKOFF_S, 0.05 * 2**num_failures)
            log.warning("tick.failed", error=type(error.orig).__name__, retry_s=backoff_s)
            stop.wait(backoff_s)
            continue
        finally:
            beat(settings.health_file)
        if look_in_s > 0:
            bell.wait_for_ring(look_in_s, should_stop=stop.is_set)
            stop.wait(max(0.0, MIN_TURN_S - (time.monotonic() - began)))


class Dispatcher:
    """One candidate for the lead of a pool. `tick` is one turn; nothing happens between turns."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        ringer: Ringer,
        *,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = uuid7()
        self._engine = engine
        self._ringer = ringer
        self._pool = settings.pool
        self._tick_s = settings.tick_s
        self._rules = Rules(look_s=settings.tick_s) if rules is None else rules
        self._clock = clock
        self._term: int | None = None
        self._last_term: int | None = None
        self._lead_due_at = self._chores_due_at = clock()
        self._num_plans = self._num_claimed = 0
        self._oldest_batch_s = 0.0
        self._glance: Glance | None = None
        self._begin()

    def glance(self) -> Glance | None:
        """What the last plan saw, from any thread; None while another leads."""
        return self._glance

    def counts(self) -> dict[str, float]:
        """What this dispatcher has done, by the names of metrics."""
        return {"medley_plans": self._num_plans, "medley_claimed_jobs": self._num_claimed}

    @property
    def term(self) -> int | None:
        """The term in which this dispatcher leads; None while another does."""
        return self._term

    def tick(self) -> float:
        """Leads where it can; as the leader does what is due and one plan. Returns seconds until the next look.

        Raises DBAPIError where PostgreSQL fails; nothing is half done then.
        """
        now = self._clock()
        try:
            if now >= self._lead_due_at:
                self._lead()
            if self._term is None:
                return self._tick_s
            if not self._keeper.has_begun:
                self._begin_books(now)
            if now >= self._chores_due_at:
                self._do_chores()
                self._chores_due_at = now + self._tick_s
            return self._dispatch()
        except leaders.TermLost:
            log.warning("term.lost", dispatcher=self.id.hex, pool=self._pool, term=self._term)
            self._term = self._glance = None
            self._lead_due_at = now
            return min(self._tick_s, MIN_TURN_S)

    def resign(self) -> None:
        """Gives the lead up, so that a standby takes it at once."""
        if self._term is None:
            return
        try:
            with transaction(self._engine) as conn:
                leaders.resign(conn, self._pool, self.id, self._term)
        except DBAPIError:
            log.info("resign.failed", dispatcher=self.id.hex)  # the term runs out by itself
        self._term = self._glance = None

    def _begin(self) -> None:
        """Forgets what was seen: another may have led since."""
        now = self._clock()
        self._planner = Planner(self._rules)
        self._keeper = Bookkeeper(self._pool)
        self._heads = Heads()
        self._clock_ahead_s = -math.inf  # the database's, of ours, at the most so far
        self._lapsed_since = 0.0  # leases that lapsed before are marked; Unix time of the database
        self._leased_since: dict[UUID, float] = {}  # worker: no job that it holds was leased before
        self._hinted: dict[UUID, list[UUID]] = {}
        self._chores_due_at = now
        self._maintain_due_at = now
        self._forecast_due_at = now
        self._homes_due_at = now
        self._hints_due_at = now
        self._jobs_per_s = 0.0  # of the whole fleet, at the last plan

    def _lead(self) -> None:
        self._lead_due_at = self._clock() + self._tick_s
        with transaction(self._engine) as conn:
            term = leaders.lead(conn, self._pool, self.id, term_s=TERM_TICKS * self._tick_s)
        if term is not None and term != self._term:
            log.info("term.began", dispatcher=self.id.hex, pool=self._pool, term=term)
            # Terms are counted: after its own last one nobody else has led, and what was seen still holds.
            if self._last_term is None or term > self._last_term + 1:
                self._begin()
            self._last_term = term
        self._term = term
        if term is None:
            self._glance = None

    def _write(self, write: Callable[[Connection], T]) -> T:
        """One transaction of this term, which is prolonged where that is due. Raises TermLost."""
        term = self._term
        if self._clock() >= self._lead_due_at:
            self._lead()
        if self._term is None or self._term != term:
            raise leaders.TermLost(f"dispatcher {self.id} lost term {term} of pool {self._pool!r}")
        with transaction(self._engine) as conn:
            leaders.hold_term(conn, self._pool, self.id, self._term)
            return write(conn)

    def _begin_books(self, now: float) -> None:
        self._write(lambda conn: changes.adopt(conn, self._pool))
        with transaction(self._engine) as conn:
            plan_each(conn)
            self._keeper.look(conn, now)

    def _do_chores(self) -> None:
        with transaction(self._engine) as conn:
            plan_each(conn)
            due = chores.read_due(conn, self._pool, self._keeper.books.shared(), self._lapsed_since)
        self._see_clock(due.at_s)
        if due.mark_gone:
            self._chore("mark_gone", self._mark_gone)
        else:
            self._lapsed_since = due.at_s - CLOCK_MARGIN_S
        if due.mark_gone or due.reclaim:
            self._chore("reclaim", self._reclaim)
        if due.expire:
            self._chore("expire", self._expire)
        if due.judge or self._clock() >= self._forecast_due_at:
            self._chore("forecast", self._forecast)
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
        for worker in self._write(lambda conn: workers.mark_gone(conn, self._pool)):
            log.warning("worker.gone", worker=worker.hex)

    def _reclaim(self) -> None:
        until = self._clock() + CHORE_S
        while num_jobs := self._write(lambda conn: workers.reclaim(conn, self._pool)):
            log.info("jobs.reclaimed", num_jobs=num_jobs)
            if self._clock() >= until:
                return

    def _fold(self) -> None:
        until = self._clock() + CHORE_S
        self._keeper.fold(self._write, self._clock(), lambda: self._clock() < until)

    def _expire(self) -> None:
        until = self._clock() + CHORE_S
        while batches := self._write(flags.expire_queued):
            log.info("jobs.expired", num_batches=len(batches))
            for batch in batches:
                self._ringer.ring_done(batch)
            if self._clock() >= until:
                return

    def _end_revoked(self) -> None:
        until = self._clock() + CHORE_S
        while batches := self._write(lambda conn: grants.end_revoked(conn, self._pool)):
            log.info("jobs.revoked", num_batches=len(batches))
            for batch in batches:
                self._ringer.ring_done(batch)
            if self._clock() >= until:
                return

    def _forecast(self) -> None:
        """Judges deadlines, and now and then says when open batches will be done."""
        is_due = self._clock() >= self._forecast_due_at
        with transaction(self._engine) as conn:
            rows = forecasts_db.read_open(conn, self._pool)
        if is_due:
            self._forecast_due_at = self._clock() + FORECAST_EVERY_S
            self._oldest_batch_s = max((row.age_s for row in rows), default=0.0)
        if not rows:
            return
        batches = [OpenBatch(r.id, r.tenant_id, r.weight, r.priority, r.num_left, r.due_s) for r in rows]
        dues = {batch.id: batch.due_s for batch in batches if batch.due_s is not None}
        verdict = judge(batches, self._jobs_per_s, HIGH)
        if verdict.hasten:
            within_s = max(dues[batch] for batch in verdict.hasten) + 1.0
            self._write(lambda conn: flags.hasten(conn, within_s, verdict.hasten))
        if is_due:
            found = [(f.batch, f.ends_in_s, f.is_late) for f in forecast(batches, self._jobs_per_s)]
            self._write(lambda conn: forecasts_db.write(conn, found, keep_s=KEEP_FORECASTS_S))

    def _ring_expansions(self) -> None:
        for sweep in self._write(sweeps.due_expansions):
            self._ringer.send_task(EXPAND_TASK, sweep.hex)

    def _ring_deliveries(self) -> None:
        for delivery in self._write(webhooks.due_rings):
            self._ringer.send_task(DELIVER_TASK, delivery.hex)

    def _dispatch(self) -> float:
        """One plan and its claims."""
        plan = self._plan(self._clock())
        if plan.desires:
            self._desire(plan.desires)
        num_claimed = self._claim(plan)
        self._hint(plan.upcoming)
        # Room that a plan saw and a claim did not fill (the worker or the jobs went) is no reason to hurry.
        return plan.look_in_s if num_claimed or plan.look_in_s else self._rules.min_look_s

    def _hint(self, upcoming: dict[UUID, list[UUID]]) -> None:
        """Tells workers which adapters come next, where that has changed: a hint, which may be lost."""
        now = self._clock()
        if now < self._hints_due_at:
            return
        self._hints_due_at = now + self._tick_s
        for worker, lanes in upcoming.items():
            if self._hinted.get(worker, []) != lanes:
                revisions = tuple(lane.hex for lane in lanes)
                self._ringer.send_task(EXPECT_TASK, revisions, queue=worker_queue(worker))
        self._hinted = upcoming

    def _plan(self, now: float) -> Plan:
        with transaction(self._engine) as conn:
            plan_each(conn)
            self._heads.see_come(self._keeper.look(conn, now))
            books = self._keeper.books
            waits = books.waiting()
            self._heads.keep_only({(lane.lane, lane.priority) for lane in waits})
            rows = self._read_stands(conn)
            self._see_sizes(conn, {lane.revision for lane in waits if lane.revision is not None})
            if now >= self._homes_due_at:
                began = time.monotonic()
                self._planner.see_homes(
                    workers.read_resident(conn, self._pool),
                    workers.read_leased_lanes(conn, self._pool, self._leased_since),
                )
                # Where much is leased, no more of the time than a fiftieth.
                self._homes_due_at = now + max(self._tick_s, 50 * (time.monotonic() - began))
            waiting = {lane.tenant for lane in waits}
            accounts = self._keeper.accounts(conn, waiting, now)
        stands = [_stands(row) for row in rows]
        self._jobs_per_s = self._planner.fleet_jobs_per_s(stands)
        top_service = 0.0 if books.backlogged or not waits else books.top_service()
        plan = self._planner.plan(waits, self._lift(accounts, waiting, top_service, now), stands, now)
        self._num_plans += 1
        assert self._term is not None
        seen = self._planner.sightings
        self._glance = Glance(
            now,
            self._pool,
            self._term,
            waits,
            rows,
            plan.num_wanted,
            seen.job_tokens,
            seen.waited_s,
            self._oldest_batch_s,
        )
        return plan

    def _see_clock(self, at_s: float) -> None:
        """What workers hold is counted from their oldest job on: anew where the database's clock was set back."""
        ahead_s = at_s - self._clock()
        if ahead_s < self._clock_ahead_s - CLOCK_MARGIN_S:
            log.warning("clock.set_back", seconds=round(self._clock_ahead_s - ahead_s, 3))
            self._leased_since, self._clock_ahead_s = {}, ahead_s
        self._clock_ahead_s = max(self._clock_ahead_s, ahead_s)

    def _read_stands(self, conn: Connection) -> list[workers.Stand]:
        stands = workers.read_stands(conn, self._pool, self._leased_since)
        self._leased_since = {stand.id: stand.leased_since for stand in stands}
        return stands

    def _see_sizes(self, conn: Connection, revisions: set[UUID]) -> None:
        """A revision never changes, so each is read once."""
        sizes = self._planner.sizes
        if unknown := revisions - sizes.keys():
            if len(sizes) > MAX_SIZES:
                sizes.clear()
            for row in adapters.read_sizes(conn, unknown):
                sizes[row.id] = AdapterSize(row.num_tiles, row.size_bytes)

    def _lift(self, accounts: Sequence[Tenant], waiting: set[UUID], top_service: float, now: float) -> list[Tenant]:
        """The tenants as they stand for this plan; writes who came back from idle and who went."""
        lifted = self._planner.lift(accounts, waiting, top_service, now)
        service = {account.id: account.service for account in accounts}
        standings = [
            counters.Standing(tenant, floor - service[tenant], is_backlogged=True)
            for tenant, floor in lifted.raised.items()
        ]
        standings += [counters.Standing(tenant, 0.0, is_backlogged=False) for tenant in lifted.satisfied]
        if standings:
            self._write(lambda conn: counters.write_standings(conn, self._pool, standings))
            self._keeper.books.see_standings(lifted.raised.keys(), lifted.satisfied)
        return lifted.tenants

    def _desire(self, desires: dict[UUID, Phase]) -> None:
        def write(conn: Connection) -> list[UUID]:
            return [w for w, phase in sorted(desires.items()) if workers.desire(conn, w, _DESIRED[phase])]

        for worker in self._write(write):
            log.info("worker.desired", worker=worker.hex, state=_DESIRED[desires[worker]].value)
            self._ringer.tell_worker(worker)

    def _claim(self, plan: Plan) -> int:
        """Claims in the order of turns, `MAX_JOBS_A_CLAIM` a transaction, and rings. Returns how many jobs."""
        num_claimed = num_jobs = 0
        wants: dict[tuple[UUID, UUID, int], queue.Want] = {}
        for made in plan.assignments:
            key = (made.worker, made.lane, made.priority)
            before = wants.get(key)
            jobs, tokens = (before.num_jobs, before.load_tokens) if before else (0, 0.0)
            wants[key] = queue.Want(*key, jobs + made.num_jobs, tokens + made.load_tokens)
            num_jobs += made.num_jobs
            if num_jobs >= MAX_JOBS_A_CLAIM:
                num_claimed += self._claim_wants(list(wants.values()))
                wants, num_jobs = {}, 0
        return num_claimed + (self._claim_wants(list(wants.values())) if wants else 0)

    def _claim_wants(self, wants: list[queue.Want]) -> int:
        wanted: Counter[Queue] = Counter()
        for want in wants:
            wanted[(want.lane, want.priority)] += want.num_jobs
        starts = self._heads.starts(wanted, self._clock())
        claimed = self._write(lambda conn: queue.claim(conn, self._pool, wants, starts))
        now = self._clock()
        ids: dict[UUID, list[str]] = defaultdict(list)
        found: Counter[Queue] = Counter()
        last: dict[Queue, str] = {}
        for got in claimed:
            lane = (got.want.lane, got.want.priority)
            found[lane] += len(got.jobs)
            last[lane] = max(last.get(lane, ""), got.jobs[-1][0])
            ids[got.want.worker] += (job for job, _ in got.jobs)
            self._planner.see_claim(got.want.worker, got.want.lane, len(got.jobs), got.est_tokens, now)
        for lane, num_jobs in wanted.items():
            end = UUID(hex=last[lane]) if lane in last else None
            self._heads.see(lane, end, is_whole=found[lane] == num_jobs, started=lane in starts, now=now)
        for worker, jobs in ids.items():
            for first in range(0, len(jobs), MAX_IDS_A_MESSAGE):
                of_message = tuple(jobs[first : first + MAX_IDS_A_MESSAGE])
                self._ringer.send_task(RUN_JOBS_TASK, of_message, queue=worker_queue(worker))
        self._num_claimed += found.total()
        log.debug("jobs.claimed", num_jobs=found.total(), num_workers=len(ids))
        return found.total()


def _stands(row: workers.Stand) -> Stands:
    return Stands(
        row.id,
        _phase(row.state, row.desired_state),
        rows_that_fit(row.max_num_seqs, row.stats),
        row.num_leased,
        row.unchanged_s,
        row.num_tiles or None,
        Totals.of(row.stats),
        _HOLDS[row.held_state],
    )


def _phase(state: WorkerState, desired: WorkerState) -> Phase:
    """What the policy may do with a worker that stands in `state` and was told `desired`."""
    if desired is WorkerState.DRAINING:
        return Phase.DRAINING
    if desired is WorkerState.ASLEEP:
        return Phase.ASLEEP if state is WorkerState.ASLEEP else Phase.LEAVING
    if desired is WorkerState.ACTIVE and state is WorkerState.ACTIVE:
        return Phase.ACTIVE
    if desired is WorkerState.ACTIVE and state in (WorkerState.ASLEEP, WorkerState.WAKING):
        return Phase.WAKING
    return Phase.LEAVING
