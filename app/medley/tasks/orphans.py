"""Files in the adapter store that no adapter has: of uploads that were cut off, or refused, after they were stored.

A look lists the store, so looks are rare. What two of them find in a row is deleted, under the lock that an upload
holds while it makes its row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import structlog
from sqlalchemy import Engine

from medley.db.adapters import hold_digest, read_unknown_digests
from medley.db.connections import transaction
from medley.store import Store

LOOK_EVERY_S = 3600.0
CHUNK = 1_000

log = structlog.get_logger()


class Orphans:
    """The looks of one process; several processes are harmless."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine, self._store = engine, store
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._due_s = time.monotonic()

    def look_if_due(self) -> None:
        """A look, where the last one is an hour ago and no other thread is at it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if time.monotonic() >= self._due_s:
                self._due_s = time.monotonic() + LOOK_EVERY_S
                self.look()
        finally:
            self._lock.release()

    def look(self) -> int:
        """Deletes what the last look has found too. Returns how many adapters that were. Raises StoreError, OSError."""
        found: set[str] = set()
        for digests in _chunks(self._store.digests()):
            with transaction(self._engine) as conn:
                found |= read_unknown_digests(conn, digests)
        num_deleted = sum(self._delete(digest) for digest in sorted(found & self._seen))
        self._seen = found - self._seen
        if num_deleted:
            log.info("store.orphans_deleted", num_adapters=num_deleted)
        return num_deleted

    def _delete(self, digest: str) -> bool:
        with transaction(self._engine) as conn:
            hold_digest(conn, digest, exclusive=True)
            if not read_unknown_digests(conn, [digest]):
                return False
            self._store.delete(digest)
            return True


def _chunks(digests: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(digests)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
