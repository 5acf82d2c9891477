"""Who is served and where: a pure function from what waits and who could run it to a plan.

It knows no clock, no rows and no messages: plain data in, plain data out, so tests and the simulator run the very
code that the dispatcher runs. `pick` says who has the next turn, `place` where its jobs go, `scale` how many workers
are awake. High priority is served before normal before low; a deadline is no rule of its own here, since jobs that
need it to be kept are raised to high before they are counted (`deadlines`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from uuid import UUID

from medley.dispatcher.pick import Waiting, serve
from medley.dispatcher.place import Fleet, Homes
from medley.dispatcher.plans import Assignment, Lane, Plan, Rules, Tenant, Worker
from medley.dispatcher.scale import count_wanted, desires

NO_HOMES: Mapping[UUID, Collection[UUID]] = {}
RULES = Rules()


def plan(
    lanes: Sequence[Lane],
    tenants: Collection[Tenant],
    workers: Sequence[Worker],
    homes: Homes = NO_HOMES,
    *,
    usual_leased: float | None = None,
    rules: Rules = RULES,
) -> Plan:
    """The plan for now. Every lane's tenant is among `tenants`.

    homes: which workers have a lane's adapter, or leased jobs that bring it there. usual_leased: jobs that the
    workers held on the average of the last `rules.drain_after_s`; None where they have not been the same that long.
    """
    fleet = Fleet(workers, homes, rules)
    counters = {t.id: t.service for t in tenants}
    weights = {t.id: t.weight for t in tenants}
    assignments: list[Assignment] = []
    left: list[Waiting] = []
    budget = rules.max_jobs
    by_class: dict[int, list[Lane]] = defaultdict(list)
    for lane in lanes:
        if lane.num_queued > 0:
            by_class[lane.priority].append(lane)
    for priority in sorted(by_class, reverse=True):
        taken, waiting = serve(by_class[priority], counters, weights, fleet, budget, rules)
        assignments += taken
        left += waiting
        budget -= sum(a.num_jobs for a in taken)
    num_left = sum(waiting.num_left for waiting in left)
    is_full = budget > 0 and not fleet.has_room(waiting.lane for waiting in left)
    return Plan(
        assignments,
        desires(fleet, workers, num_left=num_left, is_full=is_full, usual_leased=usual_leased, rules=rules),
        num_left,
        _look_in_s(fleet, num_left, budget, rules),
        _upcoming(fleet, left, rules),
        count_wanted(workers, num_left + sum(a.num_jobs for a in assignments), rules),
    )


def _look_in_s(fleet: Fleet, num_left: int, budget: int, rules: Rules) -> float:
    """A quarter of the shortest backlog while jobs wait, so that no worker runs dry."""
    if num_left == 0:
        return rules.look_s
    if not fleet.seats:
        return min(rules.look_s, rules.waking_look_s)
    if budget <= 0:
        return 0.0
    shortest = min(seat.backlog_s for seat in fleet.seats.values())
    return min(rules.look_s, max(rules.min_look_s, shortest / 4))


def _upcoming(fleet: Fleet, left: Iterable[Waiting], rules: Rules) -> dict[UUID, list[UUID]]:
    """Which adapters each worker will see next: those of waiting lanes that it has, so that they stay, then new ones.

    A guess at plans to come, in their order: a lane that has a home stays there, the others go round.
    """
    found: dict[UUID, list[UUID]] = {worker: [] for worker in fleet.seats}
    num_free = rules.num_upcoming * len(found)
    around = cycle(found)
    for waiting in left:
        if num_free == 0:
            break
        if waiting.lane.revision is None:
            continue
        homes = fleet.homes(waiting.lane)
        worker = min(homes, key=lambda w: (len(found[w]), w)) if homes else next(around)
        if len(found[worker]) < rules.num_upcoming:
            found[worker].append(waiting.lane.lane)
            num_free -= 1
    return found
