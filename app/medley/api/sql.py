"""SQL for async endpoints: each piece of work is one transaction on a thread, as many threads as connections.

Owns the threads. Knows no statement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection, Engine

from medley.db.connections import make_engine, tenant_transaction, transaction

NUM_CONNECTIONS = 12
# Creates of many jobs hold a connection for seconds; the others are kept free for everything else.
NUM_BULK = 4

T = TypeVar("T")


class Sql:
    """The process's connections as `medley_api`."""

    def __init__(self, url: str) -> None:
        self.engine: Engine = make_engine(url, name="api", pool_size=NUM_CONNECTIONS)
        self._threads = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="medley-sql")
        self._bulk = asyncio.Semaphore(NUM_BULK)

    async def run(self, tenant: UUID, act: Callable[[Connection], T]) -> T:
        """`act` in one transaction that sees `tenant`'s rows alone; committed before this returns."""
        return await self._run(tenant, act, keeps_plans=True)

    async def run_bulk(self, tenant: UUID, act: Callable[[Connection], T]) -> T:
        """`run` for work that takes long; `NUM_BULK` at a time."""
        async with self._bulk:
            return await self._run(tenant, act, keeps_plans=False)

    async def _run(self, tenant: UUID, act: Callable[[Connection], T], *, keeps_plans: bool) -> T:
        def work() -> T:
            with tenant_transaction(self.engine, tenant, keeps_plans=keeps_plans) as conn:
                return act(conn)

        return await self.call(work)

    async def run_unbound(self, act: Callable[[Connection], T]) -> T:
        """`act` in one transaction that has no tenant yet."""

        def work() -> T:
            with transaction(self.engine) as conn:
                return act(conn)

        return await self.call(work)

    async def call(self, work: Callable[[], T]) -> T:
        """Blocking work that opens its own transactions, or none."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Waits for work that runs, and closes the connections."""
        self._threads.shutdown()
        self.engine.dispose()
