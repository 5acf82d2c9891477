"""Reads of single jobs, many in one query: what is asked for while a query runs is answered by the next.

A lone read goes to the database at once; under load a query serves all who came meanwhile, so that a thousand waiters
whose jobs end together cost a few queries. One query at a time for a tenant, whose rows it sees alone.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from medley.api.sql import Sql
from medley.db.results import read_jobs_as

MAX_JOBS = 256  # of one query; with long results they are some MB

Found = Row[Any] | None


class JobReads:
    """Lives in one event loop."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._asked: dict[UUID, dict[UUID, asyncio.Future[Found]]] = {}  # tenant -> job -> answer
        self._serving: dict[UUID, asyncio.Task[None]] = {}

    async def read(self, tenant: UUID, job: UUID) -> Found:
        """The job as it is at some time after this was called; None where the tenant has no such job."""
        asked = self._asked.setdefault(tenant, {})
        answer = asked.get(job)
        if answer is None:
            answer = asked[job] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_retrieve)
        if tenant not in self._serving:
            self._serving[tenant] = asyncio.create_task(self._serve(tenant))
        # Others may wait for the same answer: one who leaves does not take it along.
        return await asyncio.shield(answer)

    async def _serve(self, tenant: UUID) -> None:
        try:
            while asked := self._asked.get(tenant):
                part = {job: asked.pop(job) for job in list(islice(asked, MAX_JOBS))}
                await self._answer(tenant, part)
        finally:
            del self._serving[tenant]
            self._asked.pop(tenant, None)

    async def _answer(self, tenant: UUID, part: dict[UUID, asyncio.Future[Found]]) -> None:
        engine = self._sql.engine
        try:
            rows = await self._sql.call(lambda: {row.id: row for row in read_jobs_as(engine, tenant, list(part))})
        except Exception as error:  # of all who asked, each of whom answers for it
            for answer in part.values():
                if not answer.cancelled():
                    answer.set_exception(error)
        else:
            for job, answer in part.items():
                if not answer.cancelled():
                    answer.set_result(rows.get(job))


def _retrieve(answer: asyncio.Future[Found]) -> None:
    """An error is the askers'; where all have left it is nobody's, and asyncio need not warn of it."""
    if not answer.cancelled():
        answer.exception()
