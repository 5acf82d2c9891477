"""Where in each lane a claim begins to look: behind what was claimed before.

Rows that were claimed stay in the queue's index for as long as anybody's snapshot is older, and a claim that begins at
a lane's head reads all of them again. A head is a guess about rows, and never the truth: jobs may come to stand before
it (given back, resumed, moved from another priority, of a transaction that took long), so it is forgotten where such
came, where less was found than was wanted, and now and then. It knows no SQL and reads no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from uuid import UUID

Queue = tuple[UUID, int]  # lane and priority

# A job that a claim passed over since another transaction held it, and then changed nothing, waits up to twice as much
# longer, and no longer than its lane has others.
LOOK_AGAIN_S = 120.0


class Heads:
    def __init__(self) -> None:
        self._heads: MutableMapping[Queue, UUID] = {}
        self._due_at: dict[Queue, float] = {}

    def starts(self, queues: Iterable[Queue], now: float) -> Mapping[Queue, UUID]:
        """The heads of those of `queues` that have one, and are not to be looked at from the beginning again."""
        return {q: head for q in queues if (head := self._heads.get(q)) is not None and now < self._due_at[q]}

    def see(self, queue: Queue, last: UUID | None, *, is_whole: bool, started: bool, now: float) -> None:
        """Takes note of a claim: the last id that it got, whether that was all it wanted, and whether it `started`
        at a head."""
        if last is None or not is_whole:
            self.forget([queue])
            return
        self._heads[queue] = last
        if not started:
            # Spread, so that not all lanes are looked at from the beginning in one plan.
            self._due_at[queue] = now + LOOK_AGAIN_S * (1 + queue[0].int % 64 / 64)

    def see_come(self, came: Iterable[tuple[Queue, UUID]]) -> None:
        """Takes note of lanes to which jobs came, each with an id that none of them is below."""
        self.forget([queue for queue, first in came if (head := self._heads.get(queue)) is not None and first < head])

    def forget(self, queues: Collection[Queue]) -> None:
        for queue in queues:
            self._heads.pop(queue, None)
            self._due_at.pop(queue, None)

    def keep_only(self, queues: Collection[Queue]) -> None:
        """Forgets lanes in which nothing waits."""
        self.forget([queue for queue in self._heads if queue not in queues])
