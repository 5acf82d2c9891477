"""The way into the engine: which process is there, and what is sent to it, in order.

Owns the place of the one live engine link, and the list of adapters that its engine was given. What may enter is the
table's decision.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from uuid import UUID

from medley.spec.wire import AdapterRef, Forget, ToEngine, Upcoming
from medley_worker.shell.engine_link import EngineLink
from medley_worker.shell.held import HeldJobs


class Feed:
    """Sends are ordered: an Abort never overtakes the Add that it is about."""

    def __init__(self, held: HeldJobs) -> None:
        self._held = held
        self._lock = threading.Lock()
        self._link: EngineLink | None = None
        self._resting: EngineLink | None = None  # gets no jobs, and still forgets
        self._given: dict[UUID, AdapterRef] = {}  # by revision
        self._expected: tuple[AdapterRef, ...] = ()

    def open(self, link: EngineLink) -> None:
        """From now on jobs go to `link`."""
        with self._lock:
            if link is not self._resting:  # a new one, which was given nothing
                self._given = {}
            self._link, self._resting = link, None
            if self._expected:
                self._announce(link, self._expected)
        self.offer()

    def rest(self) -> None:
        """From now on jobs wait. The engine stays for now, with what it was given."""
        with self._lock:
            self._link, self._resting = None, self._link or self._resting

    def close(self) -> None:
        """The engine ends. Kill a link that may be stuck before: a send in progress is waited for."""
        with self._lock:
            self._link = self._resting = None

    def offer(self) -> None:
        """Send what may enter the engine now."""
        with self._lock:
            if self._link is None:
                return
            items, later = self._held.enter()
            if items:
                self._note(item.adapter for item in items if item.adapter is not None)
                self._link.add(items)
                if later:
                    self._announce(self._link, _joined(later, self._expected))

    def expect(self, adapters: tuple[AdapterRef, ...]) -> None:
        """Adapters of jobs that are likely to be assigned next, nearest first, in place of those named before."""
        with self._lock:
            self._expected = adapters
            if self._link is not None:
                self._announce(self._link, _joined(self._held.later(), adapters))

    def given(self) -> list[UUID]:
        """The adapter revisions of which the engine may hold something: of its jobs, and those announced to it."""
        with self._lock:
            return list(self._given)

    def forget(self, revisions: Iterable[UUID]) -> int:
        """Have the engine forget these, but for those of jobs that are held. Returns how many it was told of."""
        with self._lock:
            held = self._held.revisions()
            gone = [self._given.pop(r) for r in revisions if r in self._given and r not in held]
            self._expected = tuple(adapter for adapter in self._expected if adapter not in gone)
            link = self._link or self._resting
            if gone and link is not None:
                link.send(Forget(tuple(gone)))
            return len(gone)

    def send(self, message: ToEngine) -> None:
        """Send to the engine, if there is one; an engine that is not there holds no jobs."""
        with self._lock:
            if self._link is not None:
                self._link.send(message)

    def _announce(self, link: EngineLink, adapters: tuple[AdapterRef, ...]) -> None:
        self._note(adapters)  # the engine reads them into the host's memory, whether their jobs come or not
        link.send(Upcoming(adapters))

    def _note(self, adapters: Iterable[AdapterRef]) -> None:
        self._given |= {adapter.revision: adapter for adapter in adapters}


def _joined(*parts: tuple[AdapterRef, ...]) -> tuple[AdapterRef, ...]:
    """Each revision once, at its nearest place."""
    nearest = {ref.revision: ref for part in reversed(parts) for ref in reversed(part)}
    return tuple({ref.revision: nearest[ref.revision] for part in parts for ref in part}.values())
