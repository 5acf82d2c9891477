"""`medley.cancel`: ends what is queued of cancelled batches, a piece a transaction.

Started by a message, and by a look of its own, so that it needs no Redis. It knows nothing of Celery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.db.cancels import end_piece, read_cancelling
from medley.db.connections import transaction
from medley.rings import Ringer
from medley.tasks.once import Once

LOOK_S = 5.0  # between two looks, each of which goes through the pool's open batches

log = structlog.get_logger()


class Canceller:
    """Those of one pool. on_chunk: called after each piece. should_stop: asked between pieces."""

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
        self._pool = pool
        self._on_chunk = on_chunk
        self._should_stop = should_stop
        self._once = Once()
        # Nothing of these is queued since they were cancelled at that time: what a worker gives back ends at once.
        self._through: dict[UUID, datetime] = {}
        self._look_due_at = 0.0

    def run(self, batch: UUID) -> bool:
        """Ends all that is queued of a cancelled batch; at once where it is none, or is being ended here already.
        Returns whether nothing is left.

        Raises nothing of PostgreSQL's: the next look brings the batch again.
        """
        with self._once.claim(batch) as is_free:
            if not is_free:
                return False
            try:
                return end_queue(self._engine, batch, on_piece=lambda: self._tell(batch), should_stop=self._should_stop)
            except (OperationalError, InternalError) as error:
                log.warning("cancel.interrupted", batch=batch.hex, error=type(error.orig).__name__)
                return False

    def look(self) -> None:
        """Ends the queues of cancelled batches that nobody has ended; now and then, however often it is called."""
        if time.monotonic() < self._look_due_at:
            return
        with transaction(self._engine) as conn:
            found = read_cancelling(conn, pool=self._pool)
        self._through = {batch: at for batch, at in self._through.items() if found.get(batch) == at}
        for batch, at in found.items():
            if batch not in self._through and not self._should_stop() and self.run(batch):
                self._through[batch] = at
        self._look_due_at = time.monotonic() + LOOK_S

    def _tell(self, batch: UUID) -> None:
        self._ringer.ring_done(batch)
        self._on_chunk()


def end_queue(
    engine: Engine,
    batch: UUID,
    *,
    on_piece: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Ends what is queued of a cancelled batch, a piece a transaction. Returns whether it came to the end."""
    after: UUID | None = None
    while not should_stop():
        with transaction(engine) as conn:
            after = end_piece(conn, batch, after=after)
        on_piece()
        if after is None:
            return True
    return False
