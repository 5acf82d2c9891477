"""Rings: best-effort signals over Redis that something in PostgreSQL is worth a look.

Owns the two channels, the thread that sends (`Ringer`) and the ear of a loop that sleeps between looks (`Bell`).
A ring may be lost or doubled and carries no fact: whoever hears one reads rows, and also looks by himself each
second. So nothing here blocks its caller, raises, or retries; it knows no SQL.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import redis
import structlog
from kombu.exceptions import KombuError
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.retry import Retry

from medley.celery_app import MAX_AT_ONCE, TASKS_QUEUE, Call, make_celery, send_calls, worker_queue

DONE_CHANNEL = "medley:done"  # message: hex of a batch in which results were stored
CANCEL_TASK = "medley.cancel"
EXPAND_TASK = "medley.expand"
MAINTAIN_TASK = "medley.maintain"
DELIVER_TASK = "medley.deliver"
OPENAI_TASK = "medley.openai_batch"
RUN_JOBS_TASK = "medley.run_jobs"

SOCKET_TIMEOUT_S = 1.0
# What waits for a Redis that does not answer; beyond it rings are dropped, as they would be anyway.
MAX_PENDING = 10_000

log = structlog.get_logger()


def pool_channel(pool: str) -> str:
    """The channel that wakes the dispatcher of `pool`; any message does."""
    return f"medley:ring:{pool}"


@dataclass(frozen=True)
class _Ring:
    channel: str
    message: str


class Ringer:
    """Sends rings and Celery task messages from one background thread; equal ones that wait are sent once."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect(redis_url)
        self._celery = make_celery(redis_url)
        self._pending: dict[_Ring | Call, None] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._was_down = False
        self._thread = threading.Thread(target=self._run, name="medley-ringer", daemon=True)
        self._thread.start()

    def ring(self, channel: str, message: str = "") -> None:
        """Publishes soon, or never. Returns at once."""
        self._put(_Ring(channel, message))

    def ring_done(self, batch: UUID) -> None:
        """Wakes who waits for results of `batch`."""
        self.ring(DONE_CHANNEL, batch.hex)

    def send_task(self, name: str, *args: str | tuple[str, ...], queue: str = TASKS_QUEUE) -> None:
        """Sends a Celery message soon, or never: its due time in PostgreSQL sends it again."""
        self._put(Call(name, args, queue))

    def tell_worker(self, worker: UUID) -> None:
        """Has a worker look at its row and renew its lease soon: a message without ids is about the row."""
        self.send_task(RUN_JOBS_TASK, (), queue=worker_queue(worker))

    def close(self) -> None:
        """Sends what waits where Redis answers, and ends the thread (within about two seconds)."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout=3 * SOCKET_TIMEOUT_S)
        with contextlib.suppress(redis.RedisError, OSError):
            self._redis.close()
        with contextlib.suppress(KombuError, OSError):
            self._celery.close()

    def _put(self, item: _Ring | Call) -> None:
        with self._changed:
            if len(self._pending) < MAX_PENDING:
                self._pending[item] = None
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending and not self._is_closed:
                    self._changed.wait()
                items, self._pending = list(self._pending), {}
                if not items:
                    return
            self._send(items)

    def _send(self, items: list[_Ring | Call]) -> None:
        try:
            self._publish([item for item in items if isinstance(item, _Ring)])
            if calls := [item for item in items if isinstance(item, Call)]:
                send_calls(self._celery, calls)
        except Exception as error:  # kombu lets some through that are neither its own nor the network's
            # One line an outage: every request rings.
            if not self._was_down:
                log.warning("ring.lost", num_lost=len(items), error=type(error).__name__)
            self._was_down = True
        else:
            self._was_down = False

    def _publish(self, rings: list[_Ring]) -> None:
        for start in range(0, len(rings), MAX_AT_ONCE):
            with self._redis.pipeline(transaction=False) as pipe:
                for ring in rings[start : start + MAX_AT_ONCE]:
                    pipe.publish(ring.channel, ring.message)
                pipe.execute()


class Bell:
    """The ear of one loop on one channel: sleep until it rings, or until the time for a look of one's own."""

    def __init__(self, redis_url: str, channel: str) -> None:
        self._redis = connect(redis_url)
        self._channel = channel
        self._pubsub: PubSub | None = None

    def wait_for_ring(self, timeout_s: float, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Sleeps until a ring (True) or until `timeout_s` have passed (False). Many rings count as one.

        A new subscription counts as a ring, since one may have been missed before it. While Redis is down this
        sleeps `timeout_s`. `should_stop` is asked a few times a second and ends the wait.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if self._pubsub is None:
                self._subscribe()
                return True
            while (left_s := deadline - time.monotonic()) > 0 and not should_stop():
                if self._hear(min(left_s, 0.2)):
                    while self._hear(0):
                        pass
                    return True
        except (redis.RedisError, OSError):
            self._drop()
            while (left_s := deadline - time.monotonic()) > 0 and not should_stop():
                time.sleep(min(left_s, 0.2))
        return False

    def close(self) -> None:
        """Ends the subscription."""
        self._drop()
        with contextlib.suppress(redis.RedisError, OSError):
            self._redis.close()

    def _subscribe(self) -> None:
        pubsub: PubSub = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._pubsub = pubsub
        pubsub.subscribe(self._channel)

    def _hear(self, timeout_s: float) -> bool:
        assert self._pubsub is not None
        return self._pubsub.get_message(timeout=timeout_s) is not None

    def _drop(self) -> None:
        if self._pubsub is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                self._pubsub.close()
            self._pubsub = None


def connect(redis_url: str) -> redis.Redis:
    """A client that gives up within `SOCKET_TIMEOUT_S` and does not try again by itself."""
    return redis.Redis.from_url(
        redis_url,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
