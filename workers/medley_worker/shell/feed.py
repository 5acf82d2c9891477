"""The way into the engine: which process is there, and what is sent to it, in order.

Owns the place of the one live engine link. What may enter is the table's decision.
"""

from __future__ import annotations

import threading

from medley.spec.wire import ToEngine, Upcoming
from medley_worker.shell.engine_link import EngineLink
from medley_worker.shell.held import HeldJobs


class Feed:
    """Sends are ordered: an Abort never overtakes the Add that it is about."""

    def __init__(self, held: HeldJobs) -> None:
        self._held = held
        self._lock = threading.Lock()
        self._link: EngineLink | None = None

    def open(self, link: EngineLink) -> None:
        """From now on jobs go to `link`."""
        with self._lock:
            self._link = link
        self.offer()

    def close(self) -> None:
        """From now on jobs wait. Kill a link that may be stuck before: a send in progress is waited for."""
        with self._lock:
            self._link = None

    def offer(self) -> None:
        """Send what may enter the engine now."""
        with self._lock:
            if self._link is None:
                return
            items, later = self._held.enter()
            if items:
                self._link.add(items)
                if later:
                    self._link.send(Upcoming(later))

    def send(self, message: ToEngine) -> None:
        """Send to the engine, if there is one; an engine that is not there holds no jobs."""
        with self._lock:
            if self._link is not None:
                self._link.send(message)
