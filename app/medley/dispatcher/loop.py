"""The dispatcher's loop: leads by term, does the pool's chores, reads, plans, claims, rings.

It decides nothing (`policy` does) and keeps nothing that it cannot see again. Every transaction that writes begins
by holding the term, so a leader that was stopped and goes on writes nothing. A message is only a ring, sent from a
thread of its own: workers find their rows without it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

from medley.celery_app import worker_queue
from medley.config import Settings
from medley.db import chores, counters, demand, flags, leaders, queue, sweeps, workers
from medley.db.connections import make_engine, transaction
from medley.db.workers import WorkerState
from medley.dispatcher import policy
from medley.dispatcher.policy import Phase, Plan, Rules
from medley.dispatcher.sightings import Sightings
from medley.health import beat
from medley.rings import EXPAND_TASK, MAINTAIN_TASK, Bell, Ringer, pool_channel
from medley.spec.ids import uuid7

RUN_JOBS_TASK = "medley.run_jobs"
MAX_IDS_A_MESSAGE = 256
MAX_JOBS_A_CLAIM = 1_000  # one transaction: some tens of milliseconds
TERM_TICKS = 3  # a leader that misses this many ticks is succeeded
CHORE_S = 0.5  # of a long chore in one tick: it outlasts no term, and plans go on beside it
DEADLINE_NEAR_S = 60.0
MAINTAIN_EVERY_S = 60.0
# A tenant counts as waiting for this long after its last job was claimed, so that jobs that trickle in are no returns.
SATISFIED_AFTER_S = 5.0
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
    dispatcher = Dispatcher(engine, settings, ringer)
    try:
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
        self._lead_due_at = self._chores_due_at = self._lanes_due_at = self._maintain_due_at = clock()
        self._sightings = Sightings()
        self._lanes_at: dict[UUID, set[UUID]] = {}

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
                self._lead_due_at = now + self._tick_s
            if self._term is None:
                return self._tick_s
            if now >= self._chores_due_at:
                self._do_chores()
                self._chores_due_at = now + self._tick_s
            return self._dispatch()
        except leaders.TermLost:
            log.warning("term.lost", dispatcher=self.id.hex, pool=self._pool, term=self._term)
            self._term = None
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
        self._term = None

    def _begin(self) -> None:
        """Forgets what was seen: another may have led since."""
        self._sightings = Sightings()
        self._lanes_at = {}
        self._chores_due_at = self._lanes_due_at = self._maintain_due_at = self._clock()

    def _lead(self) -> None:
        with transaction(self._engine) as conn:
            term = leaders.lead(conn, self._pool, self.id, term_s=TERM_TICKS * self._tick_s)
        if term is not None and term != self._term:
            log.info("term.began", dispatcher=self.id.hex, pool=self._pool, term=term)
            self._begin()
        self._term = term

    def _write(self, write: Callable[[Connection], T]) -> T:
        """One transaction of this term. Raises TermLost."""
        assert self._term is not None
        with transaction(self._engine) as conn:
            leaders.hold_term(conn, self._pool, self.id, self._term)
            return write(conn)

    def _do_chores(self) -> None:
        with transaction(self._engine) as conn:
            due = chores.read_due(conn, self._pool, near_s=DEADLINE_NEAR_S)
        if due.mark_gone:
            self._chore("mark_gone", self._mark_gone)
        if due.mark_gone or due.reclaim:
            self._chore("reclaim", self._reclaim)
        if due.expire:
            self._chore("expire", self._expire)
        if due.hasten:
            self._chore("hasten", lambda: self._write(lambda conn: flags.hasten(conn, DEADLINE_NEAR_S)))
        if due.expand:
            self._chore("expand", self._ring_expansions)
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

    def _expire(self) -> None:
        until = self._clock() + CHORE_S
        while batches := self._write(flags.expire_queued):
            log.info("jobs.expired", num_batches=len(batches))
            for batch in batches:
                self._ringer.ring_done(batch)
            if self._clock() >= until:
                return

    def _ring_expansions(self) -> None:
        for sweep in self._write(sweeps.due_expansions):
            self._ringer.send_task(EXPAND_TASK, sweep.hex)

    def _dispatch(self) -> float:
        """One plan and its claims."""
        now = self._clock()
        plan = self._plan(now)
        self._sightings.see_spare(plan.is_spare, now)
        if plan.desires:
            self._desire(plan.desires)
        num_claimed = self._claim(plan)
        # Room that a plan saw and a claim did not fill (the worker or the jobs went) is no reason to hurry.
        return plan.look_in_s if num_claimed or plan.look_in_s else self._rules.min_look_s

    def _plan(self, now: float) -> Plan:
        with transaction(self._engine) as conn:
            lanes = demand.read_demand(conn, self._pool)
            rows = workers.read_workers(conn, self._pool)
            if now >= self._lanes_due_at:
                self._lanes_at = {}
                for held in workers.leased_by_lane(conn, self._pool):
                    self._lanes_at.setdefault(held.worker_id, set()).add(held.lane)
                self._lanes_due_at = now + self._tick_s
            accounts = counters.read_accounts(conn, self._pool, {lane.tenant for lane in lanes})
            waited = any(account.is_backlogged for account in accounts)
            top_service = 0.0 if waited or not lanes else counters.read_top_service(conn, self._pool)
        seen = self._sightings
        seen.see_workers({row.id: row.num_leased for row in rows}, now)
        seen.see_lanes({lane.lane for lane in lanes}, now)
        return policy.plan(
            [
                policy.Lane(
                    lane.lane,
                    lane.tenant,
                    lane.revision,
                    lane.priority,
                    lane.num_queued,
                    est_tokens=seen.job_tokens(lane.lane),
                    waited_s=seen.waited_s(lane.lane, now),
                )
                for lane in lanes
            ],
            self._lift(accounts, {lane.tenant for lane in lanes}, top_service, now),
            [self._worker(row, now) for row in rows],
            spare_s=seen.spare_s(now),
            rules=self._rules,
        )

    def _lift(
        self, accounts: Sequence[counters.Account], waiting: set[UUID], top_service: float, now: float
    ) -> list[policy.Tenant]:
        """The tenants as they stand for this plan; writes who came back from idle and who went."""
        tenants = [policy.Tenant(a.tenant, a.service, a.weight, a.is_backlogged) for a in accounts]
        lifted = policy.lift(tenants, waiting, top_service)
        self._sightings.see_tenants(waiting, {t.id for t in tenants if t.is_backlogged}, now)
        standings = [counters.Standing(tenant, floor, is_backlogged=True) for tenant, floor in lifted.items()]
        standings += [
            counters.Standing(t.id, t.service, is_backlogged=False)
            for t in tenants
            if t.is_backlogged and self._sightings.satisfied_s(t.id, now) > SATISFIED_AFTER_S
        ]
        if standings:
            self._write(lambda conn: counters.write_standings(conn, self._pool, standings))
        return [policy.Tenant(t.id, lifted.get(t.id, t.service), t.weight) for t in tenants]

    def _worker(self, row: Row[Any], now: float) -> policy.Worker:
        return policy.Worker(
            row.id,
            _phase(WorkerState(row.state), WorkerState(row.desired_state)),
            row.max_num_seqs,
            row.num_leased,
            frozenset(row.resident) | self._lanes_at.get(row.id, set()),
            self._sightings.jobs_per_s(row.id),
            self._sightings.idle_s(row.id, now),
            row.unchanged_s,
        )

    def _desire(self, desires: dict[UUID, Phase]) -> None:
        def write(conn: Connection) -> None:
            for worker, phase in sorted(desires.items()):
                workers.desire(conn, worker, _DESIRED[phase])

        self._write(write)
        for worker, phase in desires.items():
            log.info("worker.desired", worker=worker.hex, state=_DESIRED[phase].value)
            # A message without ids: the worker looks at its row.
            self._ringer.send_task(RUN_JOBS_TASK, (), queue=worker_queue(worker))

    def _claim(self, plan: Plan) -> int:
        """Claims in the order of turns, some of one worker's a transaction, and rings. Returns how many jobs."""
        num_claimed = 0
        parts: dict[UUID, Counter[UUID]] = {}
        for assignment in plan.assignments:
            part = parts.setdefault(assignment.worker, Counter())
            part[assignment.lane] += assignment.num_jobs
            if part.total() >= MAX_JOBS_A_CLAIM:
                num_claimed += self._claim_part(assignment.worker, parts.pop(assignment.worker))
        for worker, part in parts.items():
            num_claimed += self._claim_part(worker, part)
        return num_claimed

    def _claim_part(self, worker: UUID, lanes: Counter[UUID]) -> int:
        claimed = self._write(lambda conn: queue.claim(conn, self._pool, worker, list(lanes.items())))
        self._sightings.see_claims(worker, [(c.lane, c.est_tokens) for c in claimed], self._clock())
        self._lanes_at.setdefault(worker, set()).update(c.lane for c in claimed)
        ids = [c.job.hex for c in claimed]
        for start in range(0, len(ids), MAX_IDS_A_MESSAGE):
            part = tuple(ids[start : start + MAX_IDS_A_MESSAGE])
            self._ringer.send_task(RUN_JOBS_TASK, part, queue=worker_queue(worker))
        log.debug("jobs.claimed", worker=worker.hex, num_jobs=len(ids), num_lanes=len(lanes))
        return len(ids)


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
