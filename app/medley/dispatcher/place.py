"""Where a job goes: the active workers' room while a plan is made, and the placements that fill it.

Punica's rule (section 5.1 of the paper): the worker with the largest working set that has a free row, preferring one
that has the adapter. When no row is free, small backlogs are filled evenly, so that no GPU waits for a round trip.
Room is rows, then backlog, and for an adapter that is not there tiles too. Within a plan room only shrinks, which is
what the shortcuts here rest on. It knows no tenants.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from uuid import UUID

from medley.dispatcher.plans import Assignment, Lane, Phase, Rules, Worker

Heap = list[tuple[float, UUID]]
Homes = Mapping[UUID, Collection[UUID]]  # lane: workers with its adapter in memory, or with jobs that bring it there


def capacity(worker: Worker, rules: Rules) -> int:
    """Jobs that a worker may hold: its rows, and a backlog of `backlog_s` (of its rows' number before it is known)."""
    if worker.jobs_per_s <= 0:
        return 2 * worker.max_num_seqs
    return worker.max_num_seqs + max(1, math.ceil(rules.backlog_s * worker.jobs_per_s))


class Seat:
    """A worker's room while a plan is made."""

    __slots__ = ("capacity", "num_leased", "tiles_left", "worker")

    def __init__(self, worker: Worker, rules: Rules) -> None:
        self.worker = worker
        self.num_leased = worker.num_leased
        self.capacity = capacity(worker, rules)
        # A worker without adapters takes any: where one is too large even so, its engine says it.
        has_any = worker.num_tiles is not None and worker.tiles_leased > 0
        self.tiles_left = (worker.num_tiles or 0) - worker.tiles_leased if has_any else math.inf

    def take_tiles(self, num_tiles: int) -> None:
        whole = self.worker.num_tiles
        if whole is not None:
            self.tiles_left = (whole if self.tiles_left == math.inf else self.tiles_left) - num_tiles

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


class Fleet:
    """The active workers' room, filled by placements. Heaps hold stale entries, dropped when they surface."""

    def __init__(self, workers: Sequence[Worker], homes: Homes, rules: Rules) -> None:
        self._rules = rules
        self.seats = {
            w.id: Seat(w, rules)
            for w in workers
            if w.phase is Phase.ACTIVE and w.max_num_seqs > 0 and w.hold is not Phase.ASLEEP
        }
        self.room = sum(seat.room for seat in self.seats.values())
        self._known_homes = homes
        self._homes: dict[UUID, set[UUID]] = {}
        # By lane, of its homes: the order is that in which each was last looked at.
        self._row_heaps: dict[UUID, Heap] = {}
        self._fill_heaps: dict[UUID, Heap] = {}
        self._by_rows: Heap = [(-s.num_leased, w) for w, s in self.seats.items() if s.num_free_rows]
        self._by_fill: Heap = [(s.fill, w) for w, s in self.seats.items() if s.room and not s.num_free_rows]
        heapq.heapify(self._by_rows)  # largest working set first
        heapq.heapify(self._by_fill)  # smallest backlog first
        # The fewest tiles for which no worker has had room: behind taken rows (False), with a free row (True).
        self._tiles_refused = {False: math.inf, True: math.inf}

    def homes(self, lane: Lane) -> set[UUID]:
        """Active workers that have the lane's adapter, placements of this plan included."""
        found = self._homes.get(lane.lane)
        if found is None:
            found = self._homes[lane.lane] = {w for w in self._known_homes.get(lane.lane, ()) if w in self.seats}
        return found

    def at_home_row(self, lane: Lane, num_jobs: int) -> Assignment | None:
        """On a free row where its adapter is; the base is at home everywhere."""
        if lane.revision is None:
            return self.at_row(lane, num_jobs)
        worker = self._at_home(self._row_heaps, lane, lambda seat: -seat.num_leased if seat.num_free_rows else None)
        return None if worker is None else self._put(worker, lane, num_jobs, self.seats[worker].num_free_rows)

    def at_row(self, lane: Lane, num_jobs: int) -> Assignment | None:
        """On a free row where its adapter is to be loaded; what a load is worth may reach into the backlog."""
        worker = self._first_with_room(self._by_rows, lane, self._wanted(lane, num_jobs))
        if worker is None:
            return None
        room = max(self.seats[worker].num_free_rows, self._wanted(lane, num_jobs))
        return self._put(worker, lane, num_jobs, room)

    def at_home_backlog(self, lane: Lane, num_jobs: int) -> Assignment | None:
        """Behind taken rows where its adapter is: on the smallest backlog."""
        if lane.revision is None:
            return self.at_backlog(lane, num_jobs)
        worker = self._at_home(self._fill_heaps, lane, lambda seat: seat.fill if seat.room else None)
        return None if worker is None else self._put(worker, lane, num_jobs, self.seats[worker].room)

    def at_backlog(self, lane: Lane, num_jobs: int) -> Assignment | None:
        """On the smallest backlog, where its adapter is to be loaded."""
        worker = self._first_with_room(self._by_fill, lane, self._wanted(lane, num_jobs))
        return None if worker is None else self._put(worker, lane, num_jobs, self.seats[worker].room)

    def has_room(self, lanes: Iterable[Lane]) -> bool:
        """Whether any worker could still take a job of any of the lanes."""
        if self.room == 0:
            return False
        with_room = {w: seat.tiles_left for w, seat in self.seats.items() if seat.room}
        most_tiles = max(with_room.values())
        return any(lane.num_tiles <= most_tiles or not self.homes(lane).isdisjoint(with_room) for lane in lanes)

    def _put(self, worker: UUID, lane: Lane, num_jobs: int, room: int) -> Assignment:
        seat, homes = self.seats[worker], self.homes(lane)
        num_jobs = min(num_jobs, room)
        seat.num_leased += num_jobs
        self.room -= num_jobs
        load_tokens = 0.0
        if lane.revision is not None and worker not in homes:
            load_tokens = lane.load_tokens
            seat.take_tiles(lane.num_tiles)
            homes.add(worker)
            self._row_heaps.pop(lane.lane, None)
            self._fill_heaps.pop(lane.lane, None)
        if seat.num_free_rows:
            heapq.heappush(self._by_rows, (-seat.num_leased, worker))
        elif seat.room:
            heapq.heappush(self._by_fill, (seat.fill, worker))
        return Assignment(worker, lane.lane, num_jobs, load_tokens, lane.priority)

    def _at_home(self, heaps: dict[UUID, Heap], lane: Lane, key: Callable[[Seat], float | None]) -> UUID | None:
        """The home with the least key; None as a key: it has no room, and will have none in this plan."""
        heap = heaps.get(lane.lane)
        if heap is None:
            keyed = ((key(self.seats[w]), w) for w in self.homes(lane))
            heap = heaps[lane.lane] = [(found, w) for found, w in keyed if found is not None]
            heapq.heapify(heap)
        while heap:
            was, worker = heap[0]
            now = key(self.seats[worker])
            if now == was:
                return worker
            if now is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (now, worker))
        return None

    def _wanted(self, lane: Lane, num_jobs: int) -> int:
        """The room for which a load is worth it: any where the adapter is nowhere yet."""
        return min(num_jobs, self._rules.jobs_a_load) if lane.revision is not None and self.homes(lane) else 1

    def _first_with_room(self, heap: Heap, lane: Lane, wanted: int) -> UUID | None:
        """The first worker of a heap that has the lane's tiles and room for `wanted` jobs."""
        by_rows = heap is self._by_rows
        if lane.num_tiles >= self._tiles_refused[by_rows]:
            return None
        passed: Heap = []
        found = None
        while heap and found is None:
            entry = heapq.heappop(heap)
            seat = self.seats[entry[1]]
            is_stale = -entry[0] != seat.num_leased if by_rows else entry[0] != seat.fill
            if is_stale or not (seat.num_free_rows if by_rows else seat.room):
                continue
            passed.append(entry)
            if seat.tiles_left >= lane.num_tiles and seat.room >= wanted:
                found = entry[1]
        if found is None and wanted == 1:
            self._tiles_refused[by_rows] = lane.num_tiles
        for entry in passed:
            heapq.heappush(heap, entry)
        return found
