"""Who is served: turns of one priority class, by the tenants' counters, and the order of a tenant's own lanes.

It knows workers only through `Fleet`, which says whether and where a turn's jobs go.

The bound. Let L be the most tokens that a claim charges for a job of a tenant, A the most that it charges for a load,
w its weight, and U = (m x L + A) / w, m the larger of max_turn
and jobs_a_load, what one turn can add to its counter. Let F be what its jobs in flight
were charged over w, and charges by estimate never be too low. Take two tenants i and j of one class that wait
throughout an interval, each with a lane that fits wherever there is room.

Theorem. At every moment of it, counter(i) - counter(j) <= U(i) + F(j). So the service that they receive in the
interval, over weight, differs by at most 2 x max(U(i) + F(j), U(j) + F(i)); where nothing is in flight (counters
before corrections) by 2 x max(U(i), U(j)).

Proof. At i's last turn its counter was the least, so then counter(i) <= counter(j), and at its end at most U(i) more.
Since then counter(i) has only sunk, by corrections; counter(j) has sunk by no more than the corrections of what was in
flight then, F(j) at the most, since a later charge is corrected by no more than itself. Counters at the interval's two
ends bound the service between them. This is VTC's argument (Sheng et al., OSDI 2024, theorem 4.4) with a turn in place
of a request and charges corrected at the end in place of charges token by token; a load is part of a charge.

No starvation: a tenant that waits has its turn once each other one that waits has had (its lead over it) / (its least
turn) turns, and who comes from idle is lifted to the least counter, so that nobody has a lead that it did not pay for.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from uuid import UUID

from medley.dispatcher.place import Fleet
from medley.dispatcher.plans import Assignment, Lane, Rules, Tenant


def lift(tenants: Collection[Tenant], waiting: Collection[UUID], top_service: float) -> dict[UUID, float]:
    """The counters of tenants that return from idle: {tenant: what its counter is at the least}.

    Raised to the least counter of those that were waiting; where none was, to `top_service`, the most that any has:
    after an idle time all begin level, and nobody saves up time in which he asked for nothing.
    """
    floor = min((t.service for t in tenants if t.is_backlogged), default=top_service)
    return {t.id: max(t.service, floor) for t in tenants if t.id in waiting and not t.is_backlogged}


class Waiting:
    """A lane while a plan is made."""

    __slots__ = ("lane", "num_left")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.num_left = lane.num_queued


Placing = Callable[[Lane, int], Assignment | None]


class Lanes:
    """One tenant's lanes: which has the next turn.

    Lanes whose adapter is where a row is free take turns until none is left; then one more adapter is loaded, of the
    lane with most jobs. So a sweep's adapters are served a few at a time and to their end, and not all at once and
    over and over. When rows are gone the same holds for backlogs. A lane that was passed over for long goes before
    all others, once a plan.

    The bound on loads. While what a worker has open fits its tiles, an adapter with n jobs that wait is loaded at
    most 1 + ceil(n / jobs_a_load) times: the first load is free of conditions, each further one comes with
    `jobs_a_load` jobs or the last ones.
    """

    def __init__(self, lanes: Sequence[Lane], fleet: Fleet, rules: Rules) -> None:
        ordered = [Waiting(lane) for lane in sorted(lanes, key=lambda lane: (-lane.num_queued, lane.lane))]
        oldest = max(ordered, key=lambda waiting: waiting.lane.waited_s)
        self._first = oldest if oldest.lane.waited_s > rules.patience_s else None
        # A lane that finds no place at one stage goes to the next and never comes back: room only shrinks. But one
        # whose adapter is about to be loaded somewhere is at home there.
        self._stages: list[tuple[Placing, deque[Waiting]]] = [
            (fleet.at_home_row, deque(w for w in ordered if w is not self._first)),
            (fleet.at_row, deque()),
            (fleet.at_home_backlog, deque()),
            (fleet.at_backlog, deque()),
        ]
        self._refused: list[Waiting] = []
        self._jobs_a_load = rules.jobs_a_load

    def turn(self, num_jobs: int) -> tuple[Waiting, Assignment] | None:
        """Places up to `num_jobs` of the lane whose turn it is. None: no lane fits anywhere."""
        if self._first is not None:
            first, self._first = self._first, None
            for place, _ in self._stages:
                made = place(first.lane, min(num_jobs, first.num_left))
                if made is not None:
                    return self._keep(0, first, made)
            self._stages[0][1].appendleft(first)
        for number, (place, queue) in enumerate(self._stages):
            # A load is for `jobs_a_load` jobs at the least, where so many wait.
            least = self._jobs_a_load if number % 2 else 0
            while queue:
                head = queue.popleft()
                made = place(head.lane, min(max(num_jobs, least), head.num_left))
                if made is not None:
                    return self._keep(number - number % 2, head, made)
                (self._stages[number + 1][1] if number < 3 else self._refused).append(head)
        return None

    def left(self) -> list[Waiting]:
        """Lanes in which jobs wait on, nearest first."""
        first = [] if self._first is None else [self._first]
        return [*first, *(waiting for _, queue in self._stages for waiting in queue), *self._refused]

    @property
    def is_empty(self) -> bool:
        return self._first is None and not any(queue for _, queue in self._stages)

    def _keep(self, stage: int, head: Waiting, made: Assignment) -> tuple[Waiting, Assignment]:
        head.num_left -= made.num_jobs
        if head.num_left:
            self._stages[stage][1].append(head)
        return head, made


def serve(
    lanes: Sequence[Lane],
    counters: dict[UUID, float],
    weights: dict[UUID, float],
    fleet: Fleet,
    budget: int,
    rules: Rules,
) -> tuple[list[Assignment], list[Waiting]]:
    """Turns of one priority class until room, budget or jobs are at their end; charges `counters`.

    Returns the assignments in the order of turns, and the lanes with jobs left, in the order of the turns to come.
    """
    by_tenant: dict[UUID, list[Lane]] = defaultdict(list)
    for lane in lanes:
        by_tenant[lane.tenant].append(lane)
    queues = {tenant: Lanes(mine, fleet, rules) for tenant, mine in by_tenant.items()}
    room = min(budget, fleet.room)
    turn = min(rules.max_turn, max(1, room // (rules.turns_per_tenant * len(queues)), room // rules.max_turns))
    heap = [(counters[tenant], tenant) for tenant in queues]
    heapq.heapify(heap)
    made: list[Assignment] = []
    while heap and budget > 0 and fleet.room > 0:
        _, tenant = heapq.heappop(heap)
        queue = queues[tenant]
        placed = queue.turn(min(turn, budget))
        if placed is None:
            continue
        waiting, assignment = placed
        made.append(assignment)
        budget -= assignment.num_jobs
        tokens = assignment.num_jobs * waiting.lane.est_tokens + assignment.load_tokens
        counters[tenant] += tokens / weights[tenant]
        if not queue.is_empty:
            heapq.heappush(heap, (counters[tenant], tenant))
    order = sorted(queues, key=lambda tenant: (counters[tenant], tenant))
    return made, [waiting for tenant in order for waiting in queues[tenant].left()]
