"""`medley.deliver`: sends a webhook's events, one attempt at a time, and notes how each attempt ended.

Started by a message, and by a look of its own for what is due, so that it needs no Redis. Retries wait in
PostgreSQL: they outlive this process.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.db import webhooks
from medley.db.connections import transaction
from medley.db.webhooks import Attempt
from medley.endpoints import Answer, post
from medley.spec.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, sign

# Seconds before each further attempt: 31 hours in all, as long as an endpoint may be away over a night and a day.
RETRY_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0)
JITTER = 0.1  # of a wait, so that an endpoint that comes back is not met by all at once
GONE = 410  # the receiver's word that it wants no more
NUM_THREADS = 4  # endpoints sent to at once

log = structlog.get_logger()


class Deliverer:
    """allow_loopback: the operator's own machine may be sent to. should_stop: asked between deliveries."""

    def __init__(
        self, engine: Engine, *, allow_loopback: bool = False, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._engine = engine
        self._allow_loopback = allow_loopback
        self._should_stop = should_stop
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="medley-deliver")
        self._running: set[UUID] = set()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Begins to send what is due, and returns at once."""
        with transaction(self._engine) as conn:
            due = webhooks.read_due(conn)
        for delivery in due:
            self.begin(delivery)

    def begin(self, delivery: UUID) -> None:
        """Sends on a thread of its own, and after it whatever is due to the same endpoint."""
        with self._lock:
            if delivery in self._running:
                return
            self._running.add(delivery)
        try:
            self._threads.submit(self._run, delivery)
        except RuntimeError:  # the process stops: the row stays due
            self._running.discard(delivery)

    def deliver(self, delivery: UUID) -> UUID | None:
        """One attempt, where it is due and nobody else makes it. Returns the endpoint where it took the event."""
        with transaction(self._engine) as conn:
            attempt = webhooks.begin_attempt(conn, delivery)
        if attempt is None:
            return None
        answer = self._send(attempt)
        self._note(attempt, answer)
        return attempt.webhook if answer.error is None else None

    def close(self) -> None:
        """Waits for the attempts that run."""
        self._threads.shutdown(cancel_futures=True)

    def _run(self, delivery: UUID) -> None:
        following: UUID | None = delivery
        try:
            while following is not None and not self._should_stop():
                webhook = self.deliver(following)
                following = None
                if webhook is not None:
                    with transaction(self._engine) as conn:
                        following = webhooks.next_due(conn, webhook)
        except (OperationalError, InternalError) as error:
            log.warning("delivery.interrupted", delivery=delivery.hex, error=type(error.orig).__name__)
        finally:
            with self._lock:
                self._running.discard(delivery)

    def _send(self, attempt: Attempt) -> Answer:
        message_id, timestamp = f"msg_{attempt.delivery.hex}", int(time.time())
        headers = {
            ID_HEADER: message_id,
            TIMESTAMP_HEADER: str(timestamp),
            SIGNATURE_HEADER: sign(message_id, timestamp, attempt.payload, attempt.secrets),
        }
        return post(attempt.url, attempt.payload, headers, allow_loopback=self._allow_loopback)

    def _note(self, attempt: Attempt, answer: Answer) -> None:
        is_last = attempt.number > len(RETRY_S) or answer.status == GONE
        retry_in_s = None
        if answer.error is not None and not is_last:
            retry_in_s = RETRY_S[attempt.number - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        with transaction(self._engine) as conn:
            webhooks.end_attempt(conn, attempt, status=answer.status, error=answer.error, retry_in_s=retry_in_s)
            if answer.error is not None and is_last:
                webhooks.disable(conn, attempt.webhook, _reason(attempt, answer))
        if answer.error is not None:
            log.info(
                "delivery.failed",
                delivery=attempt.delivery.hex,
                webhook=attempt.webhook.hex,
                attempt=attempt.number,
                status=answer.status,
                is_last=is_last,
            )


def _reason(attempt: Attempt, answer: Answer) -> str:
    if answer.status == GONE:
        return "it answered 410, that it wants no more"
    return f"{attempt.number} attempts to deliver an event failed; the last one: {answer.error}"
