"""Messages from the dispatcher: a Celery worker, in this process, on the queue of this worker.

Its tasks take what they are told and return. A message is a hint: while Redis is away Celery tries again by itself,
and the look for missed rows finds within a second what messages about jobs would have said; adapters that nobody
announced are loaded when their jobs come.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from uuid import UUID

import celery.worker.state
import structlog
from kombu.exceptions import KombuError

from medley.celery_app import make_celery, make_worker, worker_queue

RUN_JOBS = "medley.run_jobs"
EXPECT = "medley.expect"
RESTART_S = 5.0

log = structlog.get_logger()


class Messages:
    """What each message says is handed on, on the consumer's thread.

    on_ids: ids of jobs. on_expected: adapter revisions that come next, nearest first.
    """

    def __init__(
        self,
        redis_url: str,
        worker: UUID,
        on_ids: Callable[[list[UUID]], None],
        on_expected: Callable[[list[UUID]], None],
    ) -> None:
        self._worker = worker
        self._app = make_celery(redis_url, consumes=True)
        self._stopped = threading.Event()

        @self._app.task(name=RUN_JOBS, shared=False)  # type: ignore[untyped-decorator]
        def run_jobs(ids: list[str]) -> None:
            on_ids([UUID(hex=text) for text in ids])

        @self._app.task(name=EXPECT, shared=False)  # type: ignore[untyped-decorator]
        def expect(revisions: list[str]) -> None:
            on_expected([UUID(hex=text) for text in revisions])

    def run(self) -> None:
        """Consume until `stop`, on a thread of its own. Not the main one: Celery would take its signals."""
        queue = worker_queue(self._worker)
        while not self._stopped.is_set():
            make_worker(self._app, queue, pool="solo").start()
            if not self._stopped.is_set():
                log.warning("messages.interrupted", worker=self._worker.hex, retry_s=RESTART_S)
                self._stopped.wait(RESTART_S)
        # Nobody reads this queue again; where Redis is away it stays, a few bytes.
        connection = self._app.connection_for_write()
        with contextlib.suppress(KombuError, OSError, *connection.connection_errors), connection:
            connection.default_channel.queue_delete(queue)

    def stop(self) -> None:
        """Have `run` end within about a second. For ever: Celery's own flag is the process's."""
        self._stopped.set()
        celery.worker.state.should_stop = 0
