"""What waits in each lane and what each tenant has received, as the leader keeps it: sums that follow the changes.

A whole look begins them, each look at what is new goes on. They are never ahead of the rows: what the leader itself
writes comes back to it as a change like any other. It knows no SQL and reads no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from uuid import UUID

from medley.db.changes import Horizon, News
from medley.dispatcher.heads import Queue
from medley.dispatcher.planner import Waits
from medley.dispatcher.plans import Tenant


class Books:
    def __init__(self, whole: News) -> None:
        self.horizon: Horizon = whole.horizon
        self.backlogged: set[UUID] = set()
        self._waits: dict[Queue, Waits] = {}
        self._service: dict[UUID, float] = {}
        self.follow(whole)

    def follow(self, news: News) -> list[tuple[Queue, UUID]]:
        """Adds what is new. Returns the lanes to which jobs came, each with an id that none of them is below."""
        self.horizon = news.horizon
        came = []
        for change in news.demand:
            queue = (change.lane, change.priority)
            before = self._waits.get(queue)
            num_queued = change.num_queued + (0 if before is None else before.num_queued)
            if num_queued:
                self._waits[queue] = Waits(change.lane, change.tenant, change.revision, change.priority, num_queued)
            else:
                self._waits.pop(queue, None)
            if change.first is not None:
                came.append((queue, change.first))
        for total in news.counters:
            self._service[total.tenant] = self._service.get(total.tenant, 0.0) + total.service
            if total.is_backlogged:
                self.backlogged.add(total.tenant)
        return came

    def waiting(self) -> list[Waits]:
        """Where jobs wait. A count below nothing, of a lane whose jobs another look will show, is none."""
        return [waits for waits in self._waits.values() if waits.num_queued > 0]

    def shared(self) -> list[tuple[UUID, UUID]]:
        """(tenant, revision) of what waits for adapters of others: the lane of one's own is the revision itself."""
        return [(w.tenant, w.revision) for w in self._waits.values() if w.revision is not None and w.lane != w.revision]

    def accounts(self, tenants: Iterable[UUID], weights: Mapping[UUID, float]) -> list[Tenant]:
        """The accounts of `tenants`, and of all that were last seen backlogged."""
        return [
            Tenant(tenant, self._service.get(tenant, 0.0), weights.get(tenant, 1.0), tenant in self.backlogged)
            for tenant in {*tenants, *self.backlogged}
        ]

    def top_service(self) -> float:
        """The most service any tenant of the pool has received."""
        return max(self._service.values(), default=0.0)

    def see_standings(self, backlogged: Collection[UUID], satisfied: Collection[UUID]) -> None:
        """Takes note of who was written to be backlogged, and who no more."""
        self.backlogged |= set(backlogged)
        self.backlogged -= set(satisfied)
