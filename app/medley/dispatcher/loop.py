"""The dispatcher's loop: leads by term, does the pool's chores, reads, plans, claims, rings.

It decides nothing (`policy` does) and keeps nothing that it cannot see again. A message is only a ring, sent from a
thread of its own: workers find their rows without it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.celery_app import worker_queue
from medley.config import Settings
from medley.db import adapters, changes, counters, leaders, queue, workers
from medley.db.connections import make_engine, plan_each, transaction
from medley.db.workers import WorkerState
from medley.dispatcher.bookkeeper import Bookkeeper
from medley.dispatcher.glance import Glance
from medley.dispatcher.heads import Heads, Queue
from medley.dispatcher.housekeeping import CLOCK_MARGIN_S, Housekeeping
from medley.dispatcher.lead import TERM_TICKS, Lead
from medley.dispatcher.planner import AdapterSize, Planner, Stands, rows_that_fit
from medley.dispatcher.plans import Phase, Plan, Rules, Tenant
from medley.dispatcher.step_time import Totals
from medley.dispatcher.watchers import watchers
from medley.garbage import collect_rarely
from medley.health import beat
from medley.rings import RUN_JOBS_TASK, Bell, Ringer, pool_channel

EXPECT_TASK = "medley.expect"
MAX_IDS_A_MESSAGE = 256
MAX_JOBS_A_CLAIM = 1_000  # one transaction: some tens of milliseconds
MAX_SIZES = 100_000  # of adapter revisions that are remembered
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
        self._engine = engine
        self._ringer = ringer
        self._pool = settings.pool
        self._tick_s = settings.tick_s
        self._rules = Rules(look_s=settings.tick_s) if rules is None else rules
        self._clock = clock
        self._lead = Lead(engine, settings.pool, tick_s=settings.tick_s, clock=clock, on_new=self._begin)
        self._num_plans = self._num_claimed = 0
        self._jobs_per_s = 0.0  # of the whole fleet, at the last plan
        self._chores_due_at = clock()
        self._glance: Glance | None = None
        self._begin()

    def glance(self) -> Glance | None:
        """What the last plan saw, from any thread; None while another leads."""
        return self._glance

    def counts(self) -> dict[str, float]:
        """What this dispatcher has done, by the names of metrics."""
        return {"medley_plans": self._num_plans, "medley_claimed_jobs": self._num_claimed}

    @property
    def id(self) -> UUID:
        """By which it holds the lead."""
        return self._lead.id

    @property
    def term(self) -> int | None:
        """The term in which this dispatcher leads; None while another does."""
        return self._lead.term

    def tick(self) -> float:
        """Leads where it can; as the leader does what is due and one plan. Returns seconds until the next look.

        Raises DBAPIError where PostgreSQL fails; nothing is half done then.
        """
        now = self._clock()
        try:
            self._lead.renew()
            if self._lead.term is None:
                self._glance = None
                return self._tick_s
            if not self._keeper.has_begun:
                self._begin_books(now)
            if now >= self._chores_due_at:
                due = self._housekeeping.read_due()
                self._see_clock(due.at_s)
                self._housekeeping.do(due, self._jobs_per_s)
                self._chores_due_at = now + self._tick_s
            return self._dispatch()
        except leaders.TermLost:
            self._lead.lose()
            self._glance = None
            return min(self._tick_s, MIN_TURN_S)

    def resign(self) -> None:
        """Gives the lead up, so that a standby takes it at once."""
        self._lead.resign()
        self._glance = None

    def _begin(self) -> None:
        """Forgets what was seen: another may have led since."""
        now = self._clock()
        self._planner = Planner(self._rules)
        self._keeper = Bookkeeper(self._pool)
        self._housekeeping = Housekeeping(self._engine, self._pool, self._lead, self._keeper, self._ringer, self._clock)
        self._heads = Heads()
        self._clock_ahead_s = -math.inf  # the database's, of ours, at the most so far
        self._leased_since: dict[UUID, float] = {}  # worker: no job that it holds was leased before
        self._hinted: dict[UUID, list[UUID]] = {}
        self._chores_due_at = now
        self._homes_due_at = now
        self._hints_due_at = now
        self._jobs_per_s = 0.0

    def _begin_books(self, now: float) -> None:
        self._lead.write(lambda conn: changes.adopt(conn, self._pool))
        with transaction(self._engine) as conn:
            plan_each(conn)
            self._keeper.look(conn, now)

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
        assert self._lead.term is not None
        seen = self._planner.sightings
        self._glance = Glance(
            now,
            self._pool,
            self._lead.term,
            waits,
            rows,
            plan.num_wanted,
            seen.job_tokens,
            seen.waited_s,
            self._housekeeping.oldest_batch_s,
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
            self._lead.write(lambda conn: counters.write_standings(conn, self._pool, standings))
            self._keeper.books.see_standings(lifted.raised.keys(), lifted.satisfied)
        return lifted.tenants

    def _desire(self, desires: dict[UUID, Phase]) -> None:
        def write(conn: Connection) -> list[UUID]:
            return [w for w, phase in sorted(desires.items()) if workers.desire(conn, w, _DESIRED[phase])]

        for worker in self._lead.write(write):
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
        claimed = self._lead.write(lambda conn: queue.claim(conn, self._pool, wants, starts))
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
