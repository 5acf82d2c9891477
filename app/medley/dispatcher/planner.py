"""From what is seen to a plan: what the dispatcher's loop and the simulator have in common.

Owns what is remembered between plans (`sightings`, `pace`, which adapters are where) and asks `policy`. It knows no
SQL and reads no clock: what was read is handed in, with the time in seconds of a monotonic clock, and the plan is
handed back; who writes it tells what came of it (`see_claim`). All of it can be seen again: nothing here is truth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec

from medley.dispatcher import policy
from medley.dispatcher.pace import Pace
from medley.dispatcher.pick import lift
from medley.dispatcher.plans import Lane, Phase, Plan, Rules, Tenant, Worker
from medley.dispatcher.sightings import Sightings
from medley.dispatcher.step_time import StepTime, Totals

# A tenant counts as waiting for this long after its last job was claimed, so that jobs that trickle in are no returns.
SATISFIED_AFTER_S = 5.0
# What a load costs, in tokens as they are charged: 80 MB take 1.6 ms of the copy engine at 50 GB/s, in which a full
# worker does 25 tokens' work.
LOAD_TOKENS_A_BYTE = 25 / 80e6


class Waits(msgspec.Struct, frozen=True, gc=False):
    """Jobs that wait in one lane at one priority."""

    lane: UUID
    tenant: UUID
    revision: UUID | None
    priority: int
    num_queued: int


class Stands(msgspec.Struct, frozen=True):
    """A worker as its row says. num_tiles: None where it does not say."""

    id: UUID
    phase: Phase
    max_num_seqs: int
    num_leased: int
    unchanged_s: float = 0.0
    num_tiles: int | None = None
    totals: Totals | None = None
    hold: Phase | None = None


class AdapterSize(msgspec.Struct, frozen=True, gc=False):
    num_tiles: int
    size_bytes: int


class Lifted(msgspec.Struct, frozen=True):
    """The tenants for a plan, and what is to be written of them: counters raised, and who waits no more."""

    tenants: list[Tenant]
    raised: dict[UUID, float]
    satisfied: list[UUID]


NO_SIZE = AdapterSize(0, 0)
MIN_RUNNING = 8  # rows whose pages say what rows take


def rows_that_fit(max_num_seqs: int, stats: Mapping[str, Any]) -> int:
    """The rows that a worker's KV pages hold, of `max_num_seqs`, by what its running rows take of them now."""
    running, used, pages = (stats.get(name) or 0 for name in ("num_running", "pages_used", "num_pages"))
    if running < MIN_RUNNING or used <= 0 or pages <= 0:
        return max_num_seqs
    return max(1, min(max_num_seqs, int(running * pages // used)))


class Planner:
    """known: the step-time model where it is not to be fitted from reports."""

    def __init__(self, rules: Rules, known: StepTime | None = None) -> None:
        self.rules = rules
        self.sightings = Sightings()
        self.pace = Pace(known)
        self.sizes: dict[UUID, AdapterSize] = {}  # by lane
        self._homes: dict[UUID, set[UUID]] = {}
        self._tiles_leased: dict[UUID, int] = {}

    def see_homes(self, resident: Iterable[tuple[UUID, UUID]], leased: Iterable[tuple[UUID, UUID]]) -> None:
        """Which lanes are where, anew: (lane, worker) of adapters in memory, and of leased jobs."""
        self._homes, self._tiles_leased = defaultdict(set), defaultdict(int)
        for lane, worker in resident:
            self._homes[lane].add(worker)
        for lane, worker in leased:
            self._homes[lane].add(worker)
            self._tiles_leased[worker] += self.sizes.get(lane, NO_SIZE).num_tiles

    def add_home(self, lane: UUID, worker: UUID) -> None:
        homes = self._homes.setdefault(lane, set())
        if worker not in homes:
            homes.add(worker)
            tiles = self.sizes.get(lane, NO_SIZE).num_tiles
            self._tiles_leased[worker] = self._tiles_leased.get(worker, 0) + tiles

    def drop_home(self, lane: UUID, worker: UUID) -> None:
        homes = self._homes.get(lane)
        if homes is not None and worker in homes:
            homes.remove(worker)
            self._tiles_leased[worker] -= self.sizes.get(lane, NO_SIZE).num_tiles

    def see_claim(self, worker: UUID, lane: UUID, num_jobs: int, est_tokens: float, now: float) -> None:
        """Takes note of jobs of one lane that a worker was given; est_tokens: of all of them."""
        self.sightings.see_claim(worker, lane, num_jobs, est_tokens, now)
        self.add_home(lane, worker)

    def lift(self, tenants: Sequence[Tenant], waiting: set[UUID], top_service: float, now: float) -> Lifted:
        """The tenants as they stand for a plan: who comes back from idle is lifted."""
        raised = lift(tenants, waiting, top_service)
        self.sightings.see_tenants(waiting, {t.id for t in tenants if t.is_backlogged}, now)
        satisfied = [
            t.id for t in tenants if t.is_backlogged and self.sightings.satisfied_s(t.id, now) > SATISFIED_AFTER_S
        ]
        standing = [Tenant(t.id, raised.get(t.id, t.service), t.weight) for t in tenants]
        return Lifted(standing, raised, satisfied)

    def plan(
        self, waiting: Sequence[Waits], tenants: Collection[Tenant], workers: Sequence[Stands], now: float
    ) -> Plan:
        """The plan for now; every lane's tenant is among `tenants`."""
        seen, within_s = self.sightings, self.rules.drain_after_s
        for gone in seen.see_workers({w.id: w.num_leased for w in workers}, now):
            self.pace.forget(gone)
        seen.see_lanes({w.lane for w in waiting}, now)
        for worker in workers:
            if worker.totals is not None and worker.phase is Phase.ACTIVE:
                self.pace.see(worker.id, worker.totals, seen.num_finished(worker.id))
        num_active = sum(w.phase is Phase.ACTIVE for w in workers)
        seen.see_load(num_active, sum(w.num_leased for w in workers), now, within_s)
        return policy.plan(
            [self._lane(waits, now) for waits in waiting],
            tenants,
            [self._worker(worker, now) for worker in workers],
            self._homes,
            usual_leased=seen.usual_leased(now, within_s),
            rules=self.rules,
        )

    def fleet_jobs_per_s(self, workers: Sequence[Stands]) -> float:
        """What the pool does with every worker awake and full; 0 while that is not known."""
        return sum(
            max(self.sightings.jobs_per_s(worker.id), self.pace.jobs_per_s(worker.max_num_seqs))
            for worker in workers
            if worker.phase is not Phase.LEAVING
        )

    def _lane(self, waits: Waits, now: float) -> Lane:
        size = NO_SIZE if waits.revision is None else self.sizes.get(waits.lane, NO_SIZE)
        return Lane(
            waits.lane,
            waits.tenant,
            waits.revision,
            waits.priority,
            waits.num_queued,
            est_tokens=self.sightings.job_tokens(waits.lane),
            waited_s=self.sightings.waited_s(waits.lane, now),
            num_tiles=size.num_tiles,
            load_tokens=size.size_bytes * LOAD_TOKENS_A_BYTE,
        )

    def _worker(self, worker: Stands, now: float) -> Worker:
        seen = self.sightings
        return Worker(
            worker.id,
            worker.phase,
            worker.max_num_seqs,
            worker.num_leased,
            # A fit knows what a full worker does; a rate that was seen, what this one does whatever the fit says.
            max(seen.jobs_per_s(worker.id), self.pace.jobs_per_s(worker.max_num_seqs)),
            seen.idle_s(worker.id, now),
            worker.unchanged_s,
            worker.num_tiles,
            self._tiles_leased.get(worker.id, 0),
            worker.hold,
        )
