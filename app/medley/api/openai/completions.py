"""/openai/v1/completions and /openai/v1/chat/completions: a request's jobs, made, waited for and answered.

A waiting request holds no thread, connection or transaction. One whose client goes, or whose time is up, has its
jobs cancelled; with an idempotency key they go on, since the same request may come again for their results.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, submits
from medley.api.bodies import read_whole
from medley.api.decoding import Query
from medley.api.errors import ApiError, Conflict, InvalidRequest, NotReady
from medley.api.idempotency import REPLAYED, Create, read_create
from medley.api.openai.choices import completion_of, failure_of
from medley.api.openai.errors import NO_RETRY
from medley.api.openai.models import ModelNotFound, resolve_models
from medley.api.openai.requests import CHAT, COMPLETIONS, job_columns
from medley.api.openai.requests import Request as ModelRequest
from medley.api.openai.streaming import event_stream
from medley.api.shapes import answer
from medley.db.batches import HIGH, NewBatch, deadline_in, open_batch
from medley.db.cancels import cancel_batch
from medley.db.new_jobs import add_batch_demand, append_columns, lanes_of
from medley.db.quotas import reserve
from medley.db.results import read_answers
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState

LINGER_S = 60.0  # that jobs may run beyond the wait of the request that made them, should its process die

router = APIRouter(prefix="/openai")


class TimedOut(ApiError):
    status, code = 504, "timeout"


class RequestFailed(ApiError):
    """A job failed, was cancelled or expired."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.status, self.code = status, code


class ClientGone(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class _Made:
    batch: UUID
    num_jobs: int
    has_key: bool


@router.post(COMPLETIONS)
async def complete(request: Request, who: Caller = Depends(submits)) -> Response:
    return await _answer(request, who, COMPLETIONS)


@router.post(CHAT)
async def chat(request: Request, who: Caller = Depends(submits)) -> Response:
    return await _answer(request, who, CHAT)


async def _answer(request: Request, who: Caller, endpoint: str) -> Response:
    Query(request).end()
    services = who.services
    data, digest = await read_whole(request)
    create = read_create(request, digest)
    # On a thread: rendering a long chat takes milliseconds.
    wanted, faults = await services.sql.call(lambda: services.requests.read(endpoint, data, may_stream=True))
    if wanted is None:
        raise InvalidRequest.of(faults)
    made, is_replay = await services.sql.run(who.tenant.id, lambda conn: _make(conn, who, create, wanted))
    if not is_replay:
        services.ring_pool()
    try:
        await _wait(request, who, made)
    except ClientGone:
        if not made.has_key:
            await _cancel(who, made.batch)
        return Response(status_code=499)

    rows = await services.sql.run(who.tenant.id, lambda conn: _read(conn, made))
    if len(rows) < made.num_jobs:
        await _give_up(who, made)
    _raise_failure(rows)
    found = await services.sql.call(lambda: completion_of(endpoint, rows, services.base_name, services.token_texts))
    if wanted.is_stream:
        return event_stream(found, with_usage=wanted.with_stream_usage)
    return answer(found, headers=REPLAYED if is_replay else None)


def _make(conn: Connection, who: Caller, create: Create, wanted: ModelRequest) -> tuple[_Made, bool]:
    settings = who.services.settings
    id_ = uuid7()
    existing = create.claim(conn, who.tenant.id, id_)
    if existing is not None:
        return _Made(existing, wanted.num_jobs, True), True
    base_name = who.services.base_name
    resolved = resolve_models(conn, who.tenant.name, base_name, [wanted.model])[wanted.model]
    if resolved.wanted is not None:
        raise ModelNotFound(wanted.model, base_name, resolved.wanted)
    deadline_at = deadline_in(conn, settings.completion_wait_s + LINGER_S)
    # Somebody waits: before what waits in batches.
    batch = NewBatch(id_, who.tenant.id, settings.pool, priority=HIGH, deadline_at=deadline_at, is_single=True)
    open_batch(conn, batch, total=wanted.num_jobs)
    columns = job_columns([(wanted, None, resolved.revision)], base_name)
    append_columns(conn, batch, columns)
    add_batch_demand(conn, batch, lanes_of(columns))
    reserve(conn, who.tenant.id, who.tenant.quotas, id_, num_jobs=wanted.num_jobs, num_bytes=wanted.num_bytes)
    return _Made(id_, wanted.num_jobs, create.key is not None), False


def _read(conn: Connection, made: _Made) -> list[Row[Any]]:
    """The jobs' results, as many as there are."""
    rows: list[Row[Any]] = []
    while len(rows) < made.num_jobs:
        page = read_answers(conn, made.batch, after=rows[-1].id if rows else None, limit=made.num_jobs)
        if not page:
            break
        rows += page
    return rows


async def _wait(request: Request, who: Caller, made: _Made) -> None:
    """Until the jobs have ended, the time is up or the process stops. Raises ClientGone."""
    with who.services.hub.watch(who.tenant.id, made.batch, after=made.num_jobs - 1) as watch:
        ended = asyncio.create_task(watch.wait(who.services.settings.completion_wait_s))
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                raise ClientGone
        finally:
            for task in (ended, gone):
                task.cancel()
            await asyncio.gather(ended, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _give_up(who: Caller, made: _Made) -> None:
    """The jobs have not ended in time, or the process stops. Raises TimedOut or NotReady."""
    if not made.has_key:
        await _cancel(who, made.batch)
    if who.services.hub.is_closed:
        raise NotReady("this process of the service stops; try again")
    wait_s = who.services.settings.completion_wait_s
    ask = "ask again with the same idempotency key" if made.has_key else "its jobs were cancelled; use a batch"
    raise TimedOut(f"the request did not end within {wait_s:g} s; {ask}", headers=NO_RETRY)


async def _cancel(who: Caller, batch: UUID) -> None:
    await who.services.sql.run(who.tenant.id, lambda conn: cancel_batch(conn, batch))


def _raise_failure(rows: Sequence[Row[Any]]) -> None:
    """Raises for the first job that did not succeed."""
    for row in rows:
        if row.state == JobState.FAILED:
            status, error = failure_of(row)
            raise RequestFailed(status, error.code or "failed", error.message)
        if row.state == JobState.CANCELLED:
            raise Conflict("the request was cancelled")
        if row.state == JobState.EXPIRED:
            raise TimedOut("the request expired before it was done", headers=NO_RETRY)
