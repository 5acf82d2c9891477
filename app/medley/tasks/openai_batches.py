"""`medley.openai_batch`: takes the step of an OpenAI batch that is due, and the next, until none is.

Started by a message, and by a look of its own each second, so that it needs no Redis. It knows nothing of Celery;
what a step does stands in `validate` and `finalize`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.api.openai.lines import file_error
from medley.db import openai_batches
from medley.db.connections import transaction
from medley.objects import StoreError
from medley.tasks.finalize import Finalizer
from medley.tasks.once import Once
from medley.tasks.validate import Validator

log = structlog.get_logger()


class OpenAIBatches:
    """Those of one pool. Several processes at once are harmless: a step is taken by one."""

    def __init__(
        self,
        engine: Engine,
        pool: str,
        validator: Validator,
        finalizer: Finalizer,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._validator = validator
        self._finalizer = finalizer
        self._should_stop = should_stop
        self._once = Once()

    def run(self, batch: UUID) -> None:
        """Steps until none is due; at once where none is, the batch is unknown, or it is being run here already.

        Raises nothing: the due time brings the step again, and a file on which judging itself fails is refused.
        """
        with self._once.claim(batch) as is_free:
            if not is_free:
                return
            try:
                while not self._should_stop() and self._step(batch):
                    pass
            except (OperationalError, InternalError) as error:
                log.warning("openai_batch.interrupted", batch=batch.hex, error=type(error.orig).__name__)
            except (OSError, StoreError) as error:
                log.warning("openai_batch.interrupted", batch=batch.hex, error=str(error))
            except Exception as error:
                # Our bug, which one tenant's file must not make everybody's. The place, as the text may hold a prompt.
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{place.filename}:{place.lineno}"
                log.error("openai_batch.crashed", batch=batch.hex, error=type(error).__name__, at=where)
                self._refuse(batch)

    def look(self) -> None:
        """Runs every batch of the pool that has a step due, those among them whose jobs have just ended."""
        with transaction(self._engine) as conn:
            openai_batches.begin_finalizing(conn, self._pool)
            due = openai_batches.read_due(conn, self._pool)
        for batch in due:
            if self._should_stop():
                return
            self.run(batch)

    def _refuse(self, batch: UUID) -> None:
        """Fails a batch that could not be judged; one with jobs keeps them, and its step comes again."""
        error = file_error("internal_error", "the input file could not be judged for a fault of the service's own")
        with transaction(self._engine) as conn:
            openai_batches.end_without_jobs(conn, batch, "failed", errors=msgspec.json.encode([error]).decode())

    def _step(self, batch: UUID) -> bool:
        with transaction(self._engine) as conn:
            row = openai_batches.take_step(conn, batch, self._pool)
        if row is None:
            return False
        if row.state == "validating":
            self._validator.validate(row)
        elif row.state == "in_progress":
            self._validator.expand(row)
        else:
            self._finalizer.finalize(row)
        return True
