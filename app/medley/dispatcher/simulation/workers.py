"""Virtual workers: rows that step together, at the pace of the step-time model, and the adapters that they hold.

Between two events a worker's rows, and so its step time, stand still; progress is counted in steps, so an event costs
the same however many rows there are. A prompt delays its worker by what its tokens cost; a load delays its own job.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

from medley.dispatcher.plans import Phase
from medley.dispatcher.step_time import StepTime, Totals


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every worker of a simulation is like."""

    max_num_seqs: int = 64
    adapter_slots: int = 256  # adapters in device memory: 80 MB each
    step_time: StepTime
    wake_s: float = 3.0
    load_s: float = 0.005  # disk to device, as far as it is not hidden behind steps
    round_trip_s: float = 0.05  # from a plan to the worker's engine


@dataclass(slots=True, eq=False)
class Job:
    number: int
    lane: UUID
    tenant: UUID
    has_adapter: bool
    priority: int
    arrived_s: float
    prompt_tokens: int
    steps: int  # to go
    est_tokens: int
    num_done: int = 0  # steps before it was moved
    started_s: float = math.nan  # its row, the first time
    num_counted: float = 0.0  # tokens of service that its tenant's share holds already


class VirtualWorker:
    """Times are the simulation's seconds; `advance` comes before every change. Loads are counted in `loads`."""

    def __init__(self, worker: UUID, index: int, shape: Shape, loads: Counter[UUID]) -> None:
        self.id = worker
        self.index = index
        self.phase = Phase.ASLEEP
        self.changed_s = 0.0
        self.version = 0  # of what `next_end_s` said
        self._shape = shape
        self._now = 0.0
        self._debt_s = 0.0  # prompts that are computed before the next step
        self._step_s = 0.0
        self._num_steps = 0.0  # since it woke
        self._running: list[tuple[float, int, Job]] = []  # by the step at which they end
        self._waiting: list[tuple[int, int, Job]] = []
        self._num_arrived = 0
        self.leased: Counter[UUID] = Counter()  # by lane
        self._in_rows: Counter[UUID] = Counter()  # by lane
        self.resident: OrderedDict[UUID, None] = OrderedDict()  # least recently used first
        self._loads = loads
        self._steps = self._busy_s = self._rows = self._adapters = self._prompt_tokens = 0.0

    @property
    def num_leased(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def num_rows(self) -> int:
        return len(self._running)

    @property
    def totals(self) -> Totals:
        return Totals(self._steps, self._busy_s, self._rows, self._adapters, self._prompt_tokens)

    def advance(self, now: float) -> None:
        """Computes until `now`."""
        elapsed_s = now - self._now
        self._now = now
        if not self._running or elapsed_s <= 0:
            return
        self._busy_s += elapsed_s
        paid_s = min(self._debt_s, elapsed_s)
        self._debt_s -= paid_s
        steps = (elapsed_s - paid_s) / self._step_s
        self._num_steps += steps
        self._steps += steps
        self._rows += steps * len(self._running)
        self._adapters += steps * len(self._in_rows)

    def next_end_s(self) -> float:
        """When the first running job ends if nothing happens before; infinity while none runs."""
        if not self._running:
            return math.inf
        return self._now + self._debt_s + max(0.0, self._running[0][0] - self._num_steps) * self._step_s

    def deliver(self, jobs: Iterable[Job]) -> list[UUID]:
        """Jobs arrive. Returns the lanes whose adapters left for theirs."""
        for job in jobs:
            self._num_arrived += 1
            self.leased[job.lane] += 1
            heapq.heappush(self._waiting, (-job.priority, self._num_arrived, job))
        return self._admit()

    def end_due(self) -> tuple[list[Job], list[UUID]]:
        """Jobs that have ended by now, and the lanes whose adapters left for what took their rows."""
        ended = []
        while self._running and self._running[0][0] <= self._num_steps + 1e-6:
            job = heapq.heappop(self._running)[2]
            self._leave_row(job)
            self._forget(job)
            ended.append(job)
        return ended, self._admit() if ended else []

    def progress(self) -> Iterator[tuple[Job, float]]:
        """Each running job and the tokens of service that it has had: its prompt, and twice its steps."""
        for end, _, job in self._running:
            steps = min(job.steps, max(0.0, job.steps - (end - self._num_steps)))
            yield job, job.prompt_tokens + 2 * (job.num_done + steps)

    def give_back(self) -> list[Job]:
        """Every job leaves, with the steps that it has had, oldest first."""
        left = []
        for end, _, job in self._running:
            to_go = max(1, math.ceil(end - self._num_steps))
            job.num_done += max(0, job.steps - to_go)
            job.steps = min(job.steps, to_go)
            left.append(job)
        left += [job for _, _, job in self._waiting]
        self._running, self._waiting = [], []
        self.leased.clear()
        self._in_rows.clear()
        self._debt_s = 0.0
        return sorted(left, key=lambda job: job.number)

    def sleep(self) -> list[UUID]:
        """Lets its memory go. Returns the lanes whose adapters were in it."""
        gone = list(self.resident)
        self.resident.clear()
        return gone

    def _admit(self) -> list[UUID]:
        evicted: list[UUID] = []
        passed = []
        while self._waiting and len(self._running) < self._shape.max_num_seqs:
            entry = heapq.heappop(self._waiting)
            if not self._enter(entry[2], evicted):
                passed.append(entry)
        for entry in passed:
            heapq.heappush(self._waiting, entry)
        self._step_s = self._shape.step_time.step_s(len(self._running), len(self._in_rows))
        return evicted

    def _enter(self, job: Job, evicted: list[UUID]) -> bool:
        load_s = 0.0
        if job.has_adapter:
            if job.lane not in self.resident:
                if len(self.resident) >= self._shape.adapter_slots and not self._evict(evicted):
                    return False
                self._loads[job.lane] += 1
                load_s = self._shape.load_s
            self.resident[job.lane] = None
            self.resident.move_to_end(job.lane)
            self._in_rows[job.lane] += 1
        if math.isnan(job.started_s):
            job.started_s = self._now + load_s
        computed = job.prompt_tokens + job.num_done
        self._prompt_tokens += computed
        self._debt_s += computed * self._shape.step_time.prompt_token_s
        step_s = self._shape.step_time.step_s(len(self._running) + 1, len(self._in_rows))
        heapq.heappush(self._running, (self._num_steps + job.steps + load_s / step_s, job.number, job))
        return True

    def _evict(self, evicted: list[UUID]) -> bool:
        """One adapter goes: the least recently used of those that no leased job needs, else that no row needs."""
        for needed in (self.leased, self._in_rows):
            for lane in self.resident:
                if lane not in needed:
                    del self.resident[lane]
                    evicted.append(lane)
                    return True
        return False

    def _leave_row(self, job: Job) -> None:
        if job.has_adapter:
            self._in_rows[job.lane] -= 1
            if not self._in_rows[job.lane]:
                del self._in_rows[job.lane]

    def _forget(self, job: Job) -> None:
        self.leased[job.lane] -= 1
        if not self.leased[job.lane]:
            del self.leased[job.lane]
