"""What the endpoints of one process share, made when it starts and closed when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from medley.api.auth import Authenticator
from medley.api.job_reads import JobReads
from medley.api.openai.request_counts import RequestCounts
from medley.api.openai.requests import RequestReader
from medley.api.openai.tokens import TokenTexts
from medley.api.rates import RateLimiter
from medley.api.sql import Sql
from medley.api.waiters import WaiterHub
from medley.config import Settings
from medley.rings import Ringer, pool_channel
from medley.spec.base_models import BaseModel, read_base_model
from medley.store import Store

T = TypeVar("T")

NUM_INTAKES = 4  # uploads and downloads that are at the store at once; the others wait, and hold no connection


class Services:
    """Connections, keys and rates of callers, reads of jobs, counts of requests, the waiter hub, the ringer, the store
    and the threads that work on it, and what is known of the base model.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sql = Sql(settings.database_url)
        self.job_reads = JobReads(self.sql)
        self.request_counts = RequestCounts(self.sql)
        self.auth = Authenticator(self.sql, settings.quotas)
        self.rates = RateLimiter(settings.redis_url)
        self.hub = WaiterHub(self.sql, settings.redis_url)
        self.ringer = Ringer(settings.redis_url)
        self.store = Store.open(settings.store_url)
        self._intakes = ThreadPoolExecutor(NUM_INTAKES, thread_name_prefix="medley-intake")
        # Uploads are judged against it. Its weights are the workers' alone.
        self.base: BaseModel | None = None
        if settings.model is not None:
            self.base = read_base_model(Path(settings.model), need_weights=False)
        self.base_name = settings.base_name
        self.requests = RequestReader.open(settings)
        self.token_texts = TokenTexts.open(settings)

    async def take_in(self, work: Callable[[], T]) -> T:
        """Work on an upload or at the store, which takes as long as a disk or a remote store does."""
        return await asyncio.get_running_loop().run_in_executor(self._intakes, work)

    def ring_pool(self) -> None:
        """Wakes the dispatcher: there is work."""
        self.ringer.ring(pool_channel(self.settings.pool))

    async def close(self) -> None:
        await self.hub.close()
        await self.rates.close()
        self._intakes.shutdown()
        await self.sql.call(self.ringer.close)
        self.sql.close()
