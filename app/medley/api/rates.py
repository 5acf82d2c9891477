"""How many requests a second a tenant may send: counted over ten seconds in Redis, for all API processes together.

A process counts a share of a tenant's limit at once and lets so many requests in, since a round trip a request would
be a fifth of its work. A Redis that is away or slow costs nobody a request: this process then counts for itself, and
asks again in a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from medley.api.errors import RateLimited
from medley.db.tenants import Tenant

WINDOW_S = 10  # a burst of so many seconds' requests is let through at once
REDIS_TIMEOUT_S = 0.1
REDIS_PAUSE_S = 5.0  # without Redis, after it has failed once
MAX_CONNECTIONS = 32
SHARES = 200  # of a limit: what one process may have counted and not let in is one of them
SHARE_S = 1.0  # after which what is left of a share is let go

log = structlog.get_logger()


@dataclass
class _Share:
    """Requests of one tenant that are counted already."""

    left: int = 0
    until: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of who counts the next ones


class RateLimiter:
    """Counts the requests of every tenant. Lives in one event loop."""

    def __init__(self, redis_url: str) -> None:
        self._pool = BlockingConnectionPool.from_url(
            redis_url,
            max_connections=MAX_CONNECTIONS,
            timeout=REDIS_TIMEOUT_S,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        storage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix="medley:rate", connection_pool=cast(str, self._pool)
        )
        self._shared = SlidingWindowCounterRateLimiter(storage)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._alone_until = 0.0
        self._shares: defaultdict[UUID, _Share] = defaultdict(_Share)

    async def admit(self, tenant: Tenant) -> None:
        """Counts one request. Raises RateLimited where the tenant has sent too many."""
        per_s = tenant.quotas.requests_per_s
        item = RateLimitItemPerSecond(max(1, math.floor(per_s * WINDOW_S)), WINDOW_S)
        share = self._shares[tenant.id]
        if _spend(share):
            return
        async with share.lock:
            if _spend(share):
                return
            again_s = await self._hit(item, tenant.id.hex, share)
        if again_s is not None:
            raise RateLimited(per_s, WINDOW_S, again_s)

    async def _hit(self, item: RateLimitItem, tenant: str, share: _Share) -> int | None:
        """None: counted, and with it a share where there was room for one. Else the seconds until there is room."""
        if time.monotonic() >= self._alone_until:
            try:
                async with asyncio.timeout(2 * REDIS_TIMEOUT_S):
                    num = max(1, item.amount // SHARES)
                    if num > 1 and await self._shared.hit(item, tenant, cost=num):
                        share.left, share.until = num - 1, time.monotonic() + SHARE_S
                        return None
                    return await _count(self._shared, item, tenant)
            except (RedisError, OSError, TimeoutError) as error:
                self._alone_until = time.monotonic() + REDIS_PAUSE_S
                log.warning("rates.alone", error=type(error).__name__)
        return await _count(self._own, item, tenant)

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._pool.aclose()


def _spend(share: _Share) -> bool:
    if share.left == 0 or time.monotonic() > share.until:
        return False
    share.left -= 1
    return True


async def _count(limiter: SlidingWindowCounterRateLimiter, item: RateLimitItem, tenant: str) -> int | None:
    if await limiter.hit(item, tenant):
        return None
    window = await limiter.get_window_stats(item, tenant)
    return min(WINDOW_S, max(1, math.ceil(window.reset_time - time.time())))
