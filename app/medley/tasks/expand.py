"""`medley.expand`: turns a sweep's cells into jobs, a chunk a transaction, until it is whole.

Started by a message, and by a look of its own for sweeps that do not move, so that it needs no Redis. It knows
nothing of Celery.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.db import sweeps
from medley.db.connections import transaction
from medley.rings import Ringer, pool_channel
from medley.tasks.once import Once

CELLS_A_CHUNK = 2_000  # a transaction of some tens of milliseconds, and jobs to run after the first

log = structlog.get_logger()


class Expander:
    """on_chunk: called after each chunk. should_stop: asked between chunks; what is left is expanded later."""

    def __init__(
        self,
        engine: Engine,
        ringer: Ringer,
        pool: str,
        *,
        on_chunk: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._ringer = ringer
        self._channel = pool_channel(pool)
        self._on_chunk = on_chunk
        self._should_stop = should_stop
        self._once = Once()
        self._last_seen: dict[UUID, int] = {}

    def expand(self, sweep: UUID) -> None:
        """Expands until the sweep is whole; at once where it is, is unknown, or is being expanded here already.

        Raises nothing of PostgreSQL's: the sweep's due time brings it again.
        """
        with self._once.claim(sweep) as is_free:
            if not is_free:
                return
            try:
                while not self._should_stop() and not self._expand_chunk(sweep):
                    pass
            except (OperationalError, InternalError) as error:
                log.warning("sweep.interrupted", sweep=sweep.hex, error=type(error.orig).__name__)

    def look(self) -> None:
        """Expands the sweeps that have not moved since the last look."""
        with transaction(self._engine) as conn:
            seen = sweeps.read_unexpanded(conn)
        stalled = [sweep for sweep, num in seen.items() if self._last_seen.get(sweep) == num]
        self._last_seen = seen
        for sweep in stalled:
            self.expand(sweep)

    def _expand_chunk(self, sweep: UUID) -> bool:
        with transaction(self._engine) as conn:
            is_whole = sweeps.expand(conn, sweep, limit=CELLS_A_CHUNK)
        self._ringer.ring(self._channel)
        self._on_chunk()
        if is_whole:
            log.info("sweep.expanded", sweep=sweep.hex)
        return is_whole
