"""The inbox: ids of jobs that may be assigned to this worker, coalesced. Knows nothing of what they are."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import islice
from uuid import UUID

# Far more than a worker is assigned; what falls out is found by the next look for missed rows.
MAX_IDS = 100_000


class Inbox:
    """Ids from messages and looks, each once, in the order of arrival. For many writers and one reader."""

    def __init__(self) -> None:
        self._ids: dict[UUID, None] = {}
        self._changed = threading.Condition()

    def put(self, ids: Iterable[UUID]) -> None:
        """Add ids; those that wait already are not added twice."""
        with self._changed:
            for job in ids:
                if len(self._ids) >= MAX_IDS:
                    break
                self._ids[job] = None
            self._changed.notify()

    def take(self, limit: int, timeout_s: float) -> list[UUID]:
        """Up to `limit` ids, waiting up to `timeout_s` for the first; [] where none came."""
        with self._changed:
            if not self._ids:
                self._changed.wait(timeout_s)
            taken = list(islice(self._ids, limit))
            for job in taken:
                del self._ids[job]
            return taken
