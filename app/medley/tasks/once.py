"""One run of a thing at a time in this process: a message and a look may both bring it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID


class Once:
    def __init__(self) -> None:
        self._running: set[UUID] = set()
        self._lock = threading.Lock()

    @contextmanager
    def claim(self, what: UUID) -> Iterator[bool]:
        """Whether the caller may run it, until it leaves; False where it is run already."""
        with self._lock:
            is_free = what not in self._running
            self._running.add(what)
        try:
            yield is_free
        finally:
            if is_free:
                with self._lock:
                    self._running.discard(what)
