"""The waiter hub: who waits for a job's end or a batch's next results, and the one query that serves them all.

A waiter is an entry in a dictionary and an event: it holds no thread, connection or transaction. Rings from Redis
say which batches are worth a look; every second all are looked at, so a lost ring costs a second at the most.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from medley.api.sql import Sql
from medley.rings import DONE_CHANNEL, SOCKET_TIMEOUT_S

LOOK_S = 1.0  # how often all are looked at
# Rings come with every stored result; looks closer together than this would only repeat each other.
MIN_GAP_S = 0.02

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class Watch:
    """One who waits: for the end of `job`, or (None) for results of `batch` numbered above `after`, or its end."""

    tenant: UUID
    batch: UUID
    job: UUID | None = None
    after: int = 0
    _is_due: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, timeout_s: float) -> bool:
        """Sleeps until it has come (True), or until `timeout_s` have passed or the process stops (False)."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_due.wait(), timeout_s)
        return self._is_due.is_set()

    def wake(self) -> None:
        self._is_due.set()


class WaiterHub:
    """All watches of this process. Lives in one event loop."""

    def __init__(self, sql: Sql, redis_url: str) -> None:
        self._sql = sql
        self._redis_url = redis_url
        self._watches: dict[UUID, set[Watch]] = {}
        self._rung: set[UUID] = set()
        self._has_rung = asyncio.Event()
        self._is_closed = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._watches.values()))

    @property
    def is_closed(self) -> bool:
        """Whether the process stops, and waiters are let go before their time."""
        return self._is_closed

    def start(self) -> None:
        """Begins to listen and to look, in the running event loop."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        """Wakes everyone with what there is, and ends both loops."""
        self.release_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def release_all(self) -> None:
        """Lets every waiter answer with the present state, now and from now on: the process stops."""
        self._is_closed = True
        for watch in [w for watches in self._watches.values() for w in watches]:
            watch.wake()

    @contextmanager
    def watch(self, tenant: UUID, batch: UUID, *, job: UUID | None = None, after: int = 0) -> Iterator[Watch]:
        """Registers a watch for the block. It is looked at once soon, since its time may have come before."""
        watch = Watch(tenant, batch, job, after)
        if self._is_closed:
            watch.wake()
        self._watches.setdefault(batch, set()).add(watch)
        self.ring(batch)
        try:
            yield watch
        finally:
            watches = self._watches[batch]
            watches.discard(watch)
            if not watches:
                del self._watches[batch]

    def ring(self, batch: UUID) -> None:
        """Results of `batch` were stored, perhaps."""
        if batch in self._watches:
            self._rung.add(batch)
            self._has_rung.set()

    async def _listen(self) -> None:
        """Hears rings; subscribes anew each second while Redis is down."""
        while True:
            client = redis.asyncio.Redis.from_url(
                self._redis_url, socket_connect_timeout=SOCKET_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
            )
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(DONE_CHANNEL)
                    while True:
                        message = await pubsub.get_message(timeout=30)
                        if message is not None:
                            self._hear(message["data"])
            except (RedisError, OSError) as error:
                log.debug("waiters.deaf", error=type(error).__name__)
            finally:
                with contextlib.suppress(RedisError, OSError):
                    await client.aclose()
            await asyncio.sleep(LOOK_S)

    def _hear(self, data: object) -> None:
        if isinstance(data, bytes):
            with contextlib.suppress(ValueError):  # anyone who reaches Redis may publish anything
                self.ring(UUID(hex=data.decode()))

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        next_full_at = loop.time() + LOOK_S
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_rung.wait(), max(0.0, next_full_at - loop.time()))
            self._has_rung.clear()
            rung, self._rung = self._rung, set()
            if loop.time() >= next_full_at:
                rung = set(self._watches)
                next_full_at = loop.time() + LOOK_S
            watches = [w for batch in rung for w in self._watches.get(batch, ())]
            if watches:
                await self._wake_due(watches)
                await asyncio.sleep(MIN_GAP_S)

    async def _wake_due(self, watches: list[Watch]) -> None:
        try:
            due = await self._sql.run_unbound(lambda conn: _due(conn, watches))
        except SQLAlchemyError as error:
            # Each waiter ends by its own time; those that come meet the same database by themselves.
            log.warning("waiters.blind", error=type(error).__name__)
            return
        for watch in due:
            watch.wake()


_ENDED_JOBS = text("SELECT id FROM jobs WHERE id = ANY(:jobs) AND state NOT IN ('queued', 'leased')")
_BATCHES = text("SELECT id, last_seq, finished_at IS NOT NULL AS is_finished FROM batches WHERE id = ANY(:batches)")


def _due(conn: Connection, watches: Iterable[Watch]) -> list[Watch]:
    """Those of `watches` whose time has come: one transaction, tenant after tenant under row-level security."""
    by_tenant: dict[UUID, list[Watch]] = {}
    for watch in watches:
        by_tenant.setdefault(watch.tenant, []).append(watch)
    due: list[Watch] = []
    for tenant, mine in by_tenant.items():
        conn.execute(text("SELECT set_config('medley.tenant', :tenant, true)"), {"tenant": str(tenant)})
        jobs = {w.job for w in mine if w.job is not None}
        ended = set(conn.execute(_ENDED_JOBS, {"jobs": list(jobs)}).scalars()) if jobs else set()
        batches = {w.batch for w in mine if w.job is None}
        rows = conn.execute(_BATCHES, {"batches": list(batches)}) if batches else ()
        reached = {row.id: (row.last_seq, row.is_finished) for row in rows}
        for watch in mine:
            last_seq, is_finished = reached.get(watch.batch, (0, False))
            if watch.job in ended if watch.job is not None else (last_seq > watch.after or is_finished):
                due.append(watch)
    return due
