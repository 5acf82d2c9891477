"""How many requests of an unfinished batch are done, where each is several jobs (`n`): counted, and remembered.

To count goes through all jobs of the batch (0.7 s for 300,000), and whoever follows one asks again and again. So a
count stands until the batch has moved, one of a large batch for some time more, and all who ask meanwhile share it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from medley.api.sql import Sql
from medley.db.openai_batches import count_requests

EXACT_JOBS = 10_000  # batches of no more are counted whenever they have moved
REST = 20  # others rest so many times as long as the count took: it is a twentieth of one connection's work
MAX_KNOWN = 1_000  # batches of which a process remembers the counts


@dataclass(frozen=True)
class _Known:
    counts: tuple[int, int]
    moves: tuple[int, int]  # of the batch, when they were counted
    until: float


class RequestCounts:
    """Lives in one event loop."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._known: OrderedDict[UUID, _Known] = OrderedDict()
        self._counting: dict[UUID, asyncio.Task[tuple[int, int]]] = {}

    async def of(self, tenant: UUID, row: Row[Any]) -> tuple[int, int] | None:
        """(completed, failed) requests, from a row of `openai_batches.read_openai_batch`.

        None where the row itself says them: its requests are a job each, or its files have been counted.
        """
        if row.num_jobs == row.num_requests or row.num_completed is not None:
            return None
        moves = (row.last_seq, row.retried)
        known = self._known.get(row.id)
        if known is not None and (known.moves == moves or asyncio.get_running_loop().time() < known.until):
            return known.counts
        task = self._counting.get(row.id)
        if task is None:
            task = self._counting[row.id] = asyncio.create_task(self._count(tenant, row.id, moves, row.num_jobs))
            task.add_done_callback(_retrieve)
        # Others may wait for the same count: one who leaves does not take it along.
        return await asyncio.shield(task)

    async def _count(self, tenant: UUID, batch: UUID, moves: tuple[int, int], num_jobs: int) -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        try:
            began = loop.time()
            counts = await self._sql.run_bulk(tenant, lambda conn: count_requests(conn, batch))
            now = loop.time()
            rest_s = REST * (now - began) if num_jobs > EXACT_JOBS else 0.0
            self._known[batch] = _Known(counts, moves, now + rest_s)
            self._known.move_to_end(batch)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            return counts
        finally:
            del self._counting[batch]


def _retrieve(task: asyncio.Task[tuple[int, int]]) -> None:
    """An error is the askers'; where all have left it is nobody's, and asyncio need not warn of it."""
    if not task.cancelled():
        task.exception()
