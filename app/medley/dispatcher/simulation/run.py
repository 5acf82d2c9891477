"""One simulation: a trace, the dispatcher's planner, virtual workers, and a clock that jumps from event to event.

It plays the loop's part (reads what waits and who works, plans, claims, desires) and PostgreSQL's (queues, counters
charged by estimate and corrected at the end), each in as few lines as show that they do the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from medley.dispatcher.planner import AdapterSize, Planner, Stands, Waits
from medley.dispatcher.plans import Phase, Plan, Rules, Tenant
from medley.dispatcher.simulation.traces import BASE, Trace
from medley.dispatcher.simulation.workers import Job, Shape, VirtualWorker
from medley.dispatcher.step_time import Totals

REPORT_S = 2.5  # between two reports of a worker
WINDOW_S = 30.0  # in which served shares are compared
ADAPTER_BYTES = 80_000_000
DRAIN_S = 0.5  # from being told to having given everything back


@dataclass
class Course:
    """What happened. Lists are by second, or an entry each."""

    jobs: list[Job]
    ended_s: list[float]  # by job
    gpu_seconds: float = 0.0
    end_s: float = 0.0
    num_wakes: int = 0
    num_wakes_with_room: int = 0
    num_drains: int = 0
    num_migrations: int = 0
    num_plans: int = 0
    num_loads: int = 0
    loads: Counter[UUID] = field(default_factory=Counter)  # by lane
    awake: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    shares: list[dict[UUID, float]] = field(default_factory=list)  # tokens over weight of those that waited throughout


class Simulation:
    """weights: of tenants, by number; 1 where it says nothing. turn_s: the least time between two plans."""

    def __init__(
        self,
        trace: Trace,
        shape: Shape,
        num_workers: int,
        *,
        rules: Rules | None = None,
        weights: dict[int, float] | None = None,
        turn_s: float = 0.1,
    ) -> None:
        self._shape = shape
        self._rules = Rules() if rules is None else rules
        self._turn_s = turn_s
        self._planner = Planner(self._rules)
        self._jobs = _jobs(trace)
        self.course = Course(self._jobs, [math.nan] * len(self._jobs))
        self._workers = [VirtualWorker(UUID(int=i + 1), i, shape, self.course.loads) for i in range(num_workers)]
        self._by_id = {worker.id: worker for worker in self._workers}
        self._reported: list[Totals | None] = [None] * num_workers
        self._weights = {_tenant(number): weight for number, weight in (weights or {}).items()}
        self._counters: dict[UUID, float] = {}
        self._backlogged: set[UUID] = set()
        self._queues: dict[tuple[UUID, int], deque[Job]] = {}
        self._sent: Counter[UUID] = Counter()  # jobs on their way to a worker
        self._events: list[tuple[float, int, str, int, object]] = []
        self._order = itertools.count()
        self._num_queued = self._num_ended = 0
        self._throughout: set[UUID] | None = None
        self._served: dict[UUID, float] = defaultdict(float)
        for lane in {job.lane for job in self._jobs if job.has_adapter}:
            self._planner.sizes[lane] = AdapterSize(1, ADAPTER_BYTES)

    def run(self) -> Course:
        """To the end of the last job."""
        now, plan_s, arrived = 0.0, 0.0, 0
        self._at(0.0, "second", 0)
        self._at(REPORT_S, "report", 0)
        num_jobs = len(self._jobs)
        while self._num_ended < num_jobs:
            arrival_s = self._jobs[arrived].arrived_s if arrived < num_jobs else math.inf
            # A ring brings the next plan forward, but not below the least time between two.
            plan_s = min(plan_s, max(arrival_s, now + self._turn_s))
            if self._events[0][0] <= plan_s:
                now, _, kind, index, value = heapq.heappop(self._events)
                self._happen(now, kind, self._workers[index], value)
                continue
            now = plan_s
            while arrived < num_jobs and self._jobs[arrived].arrived_s <= now:
                self._queue(self._jobs[arrived])
                arrived += 1
            plan_s = now + max(self._turn_s, self._dispatch(now))
        self._close(now)
        return self.course

    def _close(self, now: float) -> None:
        self.course.end_s = now
        self.course.num_loads = sum(self.course.loads.values())
        # Whoever is awake at the end counts up to here.
        self.course.gpu_seconds += now * sum(worker.phase is not Phase.ASLEEP for worker in self._workers)

    def _at(self, time_s: float, kind: str, index: int, value: object = None) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), kind, index, value))

    def _happen(self, now: float, kind: str, worker: VirtualWorker, value: object) -> None:
        if kind == "end":
            if value == worker.version:
                worker.advance(now)
                self._end(worker, now)
        elif kind == "deliver":
            assert isinstance(value, list)
            self._deliver(worker, value, now)
        elif kind == "ready":
            self._stand(worker, Phase.ACTIVE, now)
        elif kind == "drained":
            self._give_back(worker, now)
        elif kind == "report":
            for each in self._workers:
                if each.phase is Phase.ACTIVE:
                    each.advance(now)
                    self._reported[each.index] = each.totals
            self._at(now + REPORT_S, "report", 0)
        else:
            self._look_each_second(now)

    def _look_each_second(self, now: float) -> None:
        awake = sum(worker.phase is not Phase.ASLEEP for worker in self._workers)
        self.course.awake.append(awake)
        self.course.rows.append(sum(worker.num_rows for worker in self._workers))
        self.course.queued.append(self._num_queued)
        if len(self.course.awake) % WINDOW_S == 0:
            for worker in self._workers:
                worker.advance(now)
                for job, tokens in worker.progress():
                    self._serve(job, tokens)
            if self._throughout and len(self._throughout) > 1:
                shares = {t: self._served[t] / self._weights.get(t, 1.0) for t in self._throughout}
                self.course.shares.append(shares)
            self._throughout, self._served = None, defaultdict(float)
        self._at(now + 1.0, "second", 0)

    def _serve(self, job: Job, tokens: float) -> None:
        """The job has had `tokens` of service by now."""
        self._served[job.tenant] += tokens - job.num_counted
        job.num_counted = tokens

    def _queue(self, job: Job, *, is_back: bool = False) -> None:
        queue = self._queues.setdefault((job.lane, job.priority), deque())
        if is_back:
            queue.appendleft(job)
        else:
            queue.append(job)
        self._num_queued += 1

    def _dispatch(self, now: float) -> float:
        """One plan and what comes of it. Returns seconds until the next look."""
        waiting = [
            Waits(lane, queue[0].tenant, lane if queue[0].has_adapter else None, priority, len(queue))
            for (lane, priority), queue in self._queues.items()
        ]
        stands = [
            Stands(
                worker.id,
                worker.phase,
                self._shape.max_num_seqs,
                worker.num_leased + self._sent[worker.id],
                now - worker.changed_s,
                self._shape.adapter_slots,
                self._reported[worker.index],
            )
            for worker in self._workers
        ]
        plan = self._planner.plan(waiting, self._lift(waiting, now), stands, now)
        self.course.num_plans += 1
        self._claim(plan, now)
        self._desire(plan.desires, now)
        left = {queue[0].tenant for queue in self._queues.values()}
        self._throughout = left if self._throughout is None else self._throughout & left
        return plan.look_in_s

    def _lift(self, waiting: Iterable[Waits], now: float) -> list[Tenant]:
        here = {waits.tenant for waits in waiting}
        known = [
            Tenant(t, self._counters.get(t, 0.0), self._weights.get(t, 1.0), t in self._backlogged)
            for t in here | self._backlogged
        ]
        top = max(self._counters.values(), default=0.0) if not self._backlogged else 0.0
        lifted = self._planner.lift(known, here, top, now)
        self._counters |= lifted.raised
        self._backlogged |= lifted.raised.keys()
        self._backlogged -= set(lifted.satisfied)
        return lifted.tenants

    def _charge(self, tenant: UUID, tokens: float) -> None:
        self._counters[tenant] = self._counters.get(tenant, 0.0) + tokens / self._weights.get(tenant, 1.0)

    def _claim(self, plan: Plan, now: float) -> None:
        taken: dict[UUID, list[Job]] = {}
        for assignment in plan.assignments:
            jobs = taken.setdefault(assignment.worker, [])
            num_jobs = assignment.num_jobs
            for key in ((assignment.lane, priority) for priority in (2, 1, 0)):
                queue = self._queues.get(key)
                while queue and num_jobs:
                    jobs.append(queue.popleft())
                    self._charge(jobs[-1].tenant, jobs[-1].est_tokens)
                    num_jobs -= 1
                if queue is not None and not queue:
                    del self._queues[key]
            if assignment.load_tokens:
                self._charge(jobs[-1].tenant, assignment.load_tokens)
        for worker, jobs in taken.items():
            self._num_queued -= len(jobs)
            self._sent[worker] += len(jobs)
            by_lane: dict[UUID, list[int]] = {}
            for job in jobs:
                by_lane.setdefault(job.lane, []).append(job.est_tokens)
            for lane, sizes in by_lane.items():
                self._planner.see_claim(worker, lane, len(sizes), sum(sizes), now)
            self._at(now + self._shape.round_trip_s, "deliver", self._by_id[worker].index, jobs)

    def _desire(self, desires: dict[UUID, Phase], now: float) -> None:
        for number, phase in desires.items():
            worker = self._by_id[number]
            if phase is Phase.ACTIVE:
                self.course.num_wakes += 1
                self.course.num_wakes_with_room += any(
                    w.phase is Phase.ACTIVE and w.num_leased + self._sent[w.id] < self._shape.max_num_seqs
                    for w in self._workers
                )
                self._stand(worker, Phase.WAKING, now)
                self._at(now + self._shape.wake_s, "ready", worker.index)
            elif worker.phase is Phase.ACTIVE:
                self.course.num_drains += 1
                self._stand(worker, Phase.DRAINING, now)
                self._at(now + DRAIN_S, "drained", worker.index)

    def _stand(self, worker: VirtualWorker, phase: Phase, now: float) -> None:
        if worker.phase is Phase.ASLEEP:
            self.course.gpu_seconds -= now
        if phase is Phase.ASLEEP:
            self.course.gpu_seconds += now
        worker.phase, worker.changed_s = phase, now
        worker.advance(now)

    def _deliver(self, worker: VirtualWorker, jobs: list[Job], now: float) -> None:
        self._sent[worker.id] -= len(jobs)
        if worker.phase is not Phase.ACTIVE:
            self._back(jobs)
            return
        worker.advance(now)
        self._leave(worker, worker.deliver(jobs))

    def _end(self, worker: VirtualWorker, now: float) -> None:
        ended, evicted = worker.end_due()
        for job in ended:
            self.course.ended_s[job.number] = now
            tokens = job.prompt_tokens + 2 * (job.num_done + job.steps)
            self._charge(job.tenant, tokens - job.est_tokens)
            self._serve(job, tokens)
        self._num_ended += len(ended)
        self._leave(worker, evicted)

    def _leave(self, worker: VirtualWorker, evicted: Iterable[UUID]) -> None:
        """After a change: adapters that left, and when the next job ends."""
        for lane in evicted:
            if lane not in worker.leased:
                self._planner.drop_home(lane, worker.id)
        worker.version += 1
        end_s = worker.next_end_s()
        if end_s < math.inf:
            self._at(end_s, "end", worker.index, worker.version)

    def _give_back(self, worker: VirtualWorker, now: float) -> None:
        worker.advance(now)
        jobs = worker.give_back()
        self.course.num_migrations += sum(not math.isnan(job.started_s) for job in jobs)
        self._back(jobs)
        self._leave(worker, worker.sleep())
        self._stand(worker, Phase.ASLEEP, now)

    def _back(self, jobs: list[Job]) -> None:
        for job in reversed(jobs):
            self._charge(job.tenant, -job.est_tokens)
            self._queue(job, is_back=True)


def _tenant(number: int) -> UUID:
    return UUID(int=(1 << 64) + number)


def _jobs(trace: Trace) -> list[Job]:
    columns = (
        trace.arrived_s,
        trace.tenant,
        trace.adapter,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.max_tokens,
        trace.priority,
    )
    tenants = {number: _tenant(number) for number in set(trace.tenant.tolist())}
    lanes = {number: UUID(int=(2 << 64) + number) for number in set(trace.adapter.tolist()) if number != BASE}
    return [
        Job(
            number,
            tenants[tenant] if adapter == BASE else lanes[adapter],
            tenants[tenant],
            adapter != BASE,
            priority,
            arrived_s,
            prompt,
            output,
            prompt + 2 * limit,
        )
        for number, (arrived_s, tenant, adapter, prompt, output, limit, priority) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]
