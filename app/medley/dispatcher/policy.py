"""Who is served and where: a pure function from what waits and who could run it to a plan.

It knows no clock, no rows and no messages: plain data in, plain data out, so tests and the simulator run the very
code that the dispatcher runs.

Pick (who). High priority before normal before low; a deadline is no rule of its own here, since jobs near theirs are
raised to high before they are counted. Within a class the tenant with the least service over weight has the next
turn and is charged for it at once, so one plan interleaves tenants. Two tenants that wait throughout differ by one
turn's charge at the most, plus what estimates were wrong by, which their jobs' ends correct. Within a tenant: lanes
whose adapter some worker with room has, then those with most jobs, in rotation; one lane that was passed over for
long goes first, so that none starves. Within a lane: first come, first served.

Place (where). Punica's rule (section 5.1 of the paper): the worker with the largest working set that has a free
row, preferring one that has the adapter. When no row is free, small backlogs are filled evenly, so that no GPU waits
for a round trip. A worker is woken only when no active one has room; the emptiest is drained when the others could
have carried its jobs for a while, and an idle one sleeps.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from uuid import UUID


class Phase(Enum):
    ASLEEP = auto()
    WAKING = auto()  # told to be active, not there yet
    ACTIVE = auto()
    DRAINING = auto()  # told to give its jobs back
    LEAVING = auto()  # on its way to sleep or out: neither assigned nor told anything


@dataclass(frozen=True)
class Rules:
    """The policy's constants. Seconds, jobs and shares."""

    backlog_s: float = 2.0  # work that is leased ahead: more than a round trip, less than a tenant's patience
    turns_per_tenant: int = 16  # a plan has about this many turns for each tenant
    max_turn: int = 16  # jobs of one turn
    max_jobs: int = 4_000  # jobs of one plan: a second's writes at the most
    patience_s: float = 30.0  # a lane that was passed over for longer goes first, one a tenant and plan
    wake_patience_s: float = 120.0  # a worker that takes longer to wake is no longer waited for
    idle_sleep_s: float = 30.0
    drain_after_s: float = 10.0
    spare_fill: float = 0.8  # share of the others' rows that may be taken when one is drained
    look_s: float = 1.0  # the longest time between two plans
    min_look_s: float = 0.05
    waking_look_s: float = 0.25  # while jobs wait and no worker is active yet


@dataclass(frozen=True)
class Lane:
    """Jobs that wait for one adapter revision of one tenant (None: the base) at one priority."""

    lane: UUID
    tenant: UUID
    revision: UUID | None
    priority: int
    num_queued: int
    est_tokens: float = 1.0  # of one job, as the claim will charge it
    waited_s: float = 0.0  # since the lane was served, or first seen


@dataclass(frozen=True)
class Tenant:
    id: UUID
    service: float  # tokens over weight
    weight: float = 1.0
    is_backlogged: bool = True


@dataclass(frozen=True)
class Worker:
    id: UUID
    phase: Phase
    max_num_seqs: int
    num_leased: int = 0
    lanes: frozenset[UUID] = frozenset()  # adapters in its memory, and those its leased jobs bring there
    jobs_per_s: float = 0.0
    idle_s: float = 0.0  # for how long it has held no job
    unchanged_s: float = 0.0  # since its state or desired state changed


@dataclass(frozen=True)
class Assignment:
    worker: UUID
    lane: UUID
    num_jobs: int


@dataclass(frozen=True)
class Plan:
    """What to write: claims in the order of turns, and the phases that workers are told to take."""

    assignments: list[Assignment]
    desires: dict[UUID, Phase]
    num_left: int  # jobs that wait on
    is_spare: bool  # the emptiest worker's jobs would fit the others
    look_in_s: float  # when to plan again, if nothing rings before


def lift(tenants: Collection[Tenant], waiting: Collection[UUID], top_service: float) -> dict[UUID, float]:
    """The counters of tenants that return from idle: {tenant: what its counter is at the least}.

    Raised to the least counter of those that were waiting; where none was, to `top_service`, the most that any has:
    after an idle time all begin level, and nobody saves up time in which he asked for nothing.
    """
    floor = min((t.service for t in tenants if t.is_backlogged), default=top_service)
    return {t.id: max(t.service, floor) for t in tenants if t.id in waiting and not t.is_backlogged}


def plan(
    lanes: Sequence[Lane],
    tenants: Collection[Tenant],
    workers: Sequence[Worker],
    *,
    spare_s: float = 0.0,
    rules: Rules = Rules(),
) -> Plan:
    """The plan for now. Every lane's tenant is among `tenants`; `spare_s`: how long plans have been spare."""
    fleet = _Fleet(workers, rules)
    counters = {t.id: t.service for t in tenants}
    weights = {t.id: t.weight for t in tenants}
    assignments: list[Assignment] = []
    budget = rules.max_jobs
    by_class: dict[int, list[Lane]] = defaultdict(list)
    for lane in lanes:
        if lane.num_queued > 0:
            by_class[lane.priority].append(lane)
    num_left = sum(lane.num_queued for waiting in by_class.values() for lane in waiting)
    for priority in sorted(by_class, reverse=True):
        taken = _serve(by_class[priority], counters, weights, fleet, budget, rules)
        num_taken = sum(a.num_jobs for a in taken)
        assignments += taken
        budget -= num_taken
        num_left -= num_taken
    is_spare = num_left == 0 and fleet.could_spare_one()
    return Plan(
        assignments,
        fleet.desires(num_left, spare_s if is_spare else 0.0),
        num_left,
        is_spare,
        fleet.look_in_s(num_left),
    )


@dataclass
class _Waiting:
    lane: Lane
    num_left: int


def _serve(
    lanes: Sequence[Lane],
    counters: dict[UUID, float],
    weights: dict[UUID, float],
    fleet: _Fleet,
    budget: int,
    rules: Rules,
) -> list[Assignment]:
    """Turns of one priority class until room, budget or jobs are at their end; charges `counters`."""
    by_tenant: dict[UUID, list[Lane]] = defaultdict(list)
    for lane in lanes:
        by_tenant[lane.tenant].append(lane)
    queues = {tenant: _rotation(mine, fleet, rules) for tenant, mine in by_tenant.items()}
    turn = min(rules.max_turn, max(1, min(budget, fleet.room) // (rules.turns_per_tenant * len(queues))))
    heap = [(counters[tenant], tenant) for tenant in queues]
    heapq.heapify(heap)
    made: list[Assignment] = []
    while heap and budget > 0 and fleet.room > 0:
        _, tenant = heapq.heappop(heap)
        queue = queues[tenant]
        head = queue.popleft()
        worker, num_jobs = fleet.place(head.lane, min(turn, head.num_left, budget))
        made.append(Assignment(worker, head.lane.lane, num_jobs))
        budget -= num_jobs
        head.num_left -= num_jobs
        if head.num_left:
            queue.append(head)
        counters[tenant] += num_jobs * head.lane.est_tokens / weights[tenant]
        if queue:
            heapq.heappush(heap, (counters[tenant], tenant))
    return made


def _rotation(lanes: Sequence[Lane], fleet: _Fleet, rules: Rules) -> deque[_Waiting]:
    """A tenant's lanes in the order in which they have their turns."""
    ordered = sorted(lanes, key=lambda lane: (not fleet.has_home(lane), -lane.num_queued, lane.lane))
    passed_over = max(lanes, key=lambda lane: lane.waited_s)
    if passed_over.waited_s > rules.patience_s:
        ordered.remove(passed_over)
        ordered.insert(0, passed_over)
    return deque(_Waiting(lane, lane.num_queued) for lane in ordered)


@dataclass
class _Seat:
    """A worker's room while a plan is made."""

    worker: Worker
    num_leased: int = field(init=False)
    capacity: int = field(init=False)

    def __init__(self, worker: Worker, rules: Rules) -> None:
        self.worker = worker
        self.num_leased = worker.num_leased
        backlog = max(worker.max_num_seqs, math.ceil(rules.backlog_s * worker.jobs_per_s))
        self.capacity = worker.max_num_seqs + backlog

    @property
    def num_free_rows(self) -> int:
        return max(0, self.worker.max_num_seqs - self.num_leased)

    @property
    def room(self) -> int:
        return max(0, self.capacity - self.num_leased)

    @property
    def fill(self) -> float:
        return self.num_leased / self.capacity

    @property
    def backlog_s(self) -> float:
        """Seconds until a row is free for want of jobs; 0 where the rate is unknown."""
        ahead = max(0, self.num_leased - self.worker.max_num_seqs)
        return ahead / self.worker.jobs_per_s if self.worker.jobs_per_s > 0 else 0.0


class _Fleet:
    """The workers' room, filled by placements. Heaps hold stale entries, which are dropped when they surface."""

    def __init__(self, workers: Sequence[Worker], rules: Rules) -> None:
        self._rules = rules
        self._workers = workers
        self._seats = {w.id: _Seat(w, rules) for w in workers if w.phase is Phase.ACTIVE and w.max_num_seqs > 0}
        self.room = sum(seat.room for seat in self._seats.values())
        self._homes: dict[UUID, set[UUID]] = defaultdict(set)
        self._by_rows: list[tuple[int, UUID]] = []  # largest working set first
        self._by_fill: list[tuple[float, UUID]] = []  # smallest backlog first
        for worker, seat in self._seats.items():
            self._offer(worker, seat)
            if seat.room:
                for lane in seat.worker.lanes:
                    self._homes[lane].add(worker)

    def has_home(self, lane: Lane) -> bool:
        """Whether a worker with room has the lane's adapter (or it needs none)."""
        return lane.revision is None or lane.lane in self._homes

    def place(self, lane: Lane, num_jobs: int) -> tuple[UUID, int]:
        """Puts up to `num_jobs` of the lane on the best worker: (worker, how many). There must be room."""
        homes = () if lane.revision is None else self._homes.get(lane.lane, ())
        worker = self._with_rows(homes)
        if worker is not None:
            seat = self._seats[worker]
            num_jobs = min(num_jobs, seat.num_free_rows)
        else:
            worker = self._with_backlog(homes)
            seat = self._seats[worker]
            num_jobs = min(num_jobs, seat.room)
        seat.num_leased += num_jobs
        self.room -= num_jobs
        self._homes[lane.lane].add(worker)
        self._offer(worker, seat)
        return worker, num_jobs

    def could_spare_one(self) -> bool:
        """Whether the emptiest worker's jobs would fit into the others' rows."""
        if len(self._seats) < 2:
            return False
        rows = [seat.worker.max_num_seqs for seat in self._seats.values()]
        num_leased = sum(seat.num_leased for seat in self._seats.values())
        return num_leased <= self._rules.spare_fill * (sum(rows) - self._emptiest().worker.max_num_seqs)

    def desires(self, num_left: int, spare_s: float) -> dict[UUID, Phase]:
        """The phases workers are to take. At most one is woken and one is drained in a plan."""
        found = {w.id: Phase.ASLEEP for w in self._workers if w.phase is Phase.DRAINING and w.num_leased == 0}
        if num_left > 0:
            woken = self._wake(num_left) if self.room == 0 else None
            return found if woken is None else found | {woken: Phase.ACTIVE}
        for seat in self._seats.values():
            if seat.num_leased == 0 and seat.worker.idle_s >= self._rules.idle_sleep_s:
                found[seat.worker.id] = Phase.ASLEEP
        is_draining = any(w.phase is Phase.DRAINING for w in self._workers)
        if spare_s >= self._rules.drain_after_s and not is_draining and self._emptiest().num_leased > 0:
            found[self._emptiest().worker.id] = Phase.DRAINING
        return found

    def look_in_s(self, num_left: int) -> float:
        """A quarter of the shortest backlog while jobs wait, so that no worker runs dry."""
        rules = self._rules
        if num_left == 0:
            return rules.look_s
        if not self._seats:
            return min(rules.look_s, rules.waking_look_s)
        if self.room > 0:
            return 0.0
        shortest = min(seat.backlog_s for seat in self._seats.values())
        return min(rules.look_s, max(rules.min_look_s, shortest / 4))

    def _wake(self, num_left: int) -> UUID | None:
        """The worker to wake, where what is waking already has not room enough for `num_left` jobs."""
        waking = [w for w in self._workers if w.phase is Phase.WAKING and w.unchanged_s <= self._rules.wake_patience_s]
        if num_left <= sum(2 * w.max_num_seqs for w in waking):
            return None
        return min((w.id for w in self._workers if w.phase is Phase.ASLEEP), default=None)

    def _emptiest(self) -> _Seat:
        return min(self._seats.values(), key=lambda seat: (seat.num_leased, seat.worker.id))

    def _offer(self, worker: UUID, seat: _Seat) -> None:
        if seat.num_free_rows:
            heapq.heappush(self._by_rows, (-seat.num_leased, worker))
        elif seat.room:
            heapq.heappush(self._by_fill, (seat.fill, worker))

    def _with_rows(self, homes: Collection[UUID]) -> UUID | None:
        """The worker with a free row and the largest working set, of `homes` where one has a row."""
        at_home = [w for w in homes if self._seats[w].num_free_rows]
        if at_home:
            return min(at_home, key=lambda w: (-self._seats[w].num_leased, w))
        while self._by_rows:
            negative, worker = self._by_rows[0]
            if -negative == self._seats[worker].num_leased:
                return worker
            heapq.heappop(self._by_rows)
        return None

    def _with_backlog(self, homes: Collection[UUID]) -> UUID:
        """The worker with the smallest backlog that has room, of `homes` where one has."""
        at_home = [w for w in homes if self._seats[w].room]
        if at_home:
            return min(at_home, key=lambda w: (self._seats[w].fill, w))
        while True:
            fill, worker = self._by_fill[0]
            if fill == self._seats[worker].fill and self._seats[worker].room:
                return worker
            heapq.heappop(self._by_fill)
