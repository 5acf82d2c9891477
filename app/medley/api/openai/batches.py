"""/openai/v1/batches: a file of requests run as one native batch; create, read, list, cancel.

A create writes rows alone: tasks validate the file, make its jobs and write its results, as `medley.tasks` says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import Meta
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, reads, submits
from medley.api.bodies import read_whole
from medley.api.decoding import Query, decode_body
from medley.api.errors import Conflict, FaultList, InvalidRequest, NotFound
from medley.api.idempotency import REPLAYED, read_create
from medley.api.openai.requests import ENDPOINTS
from medley.api.openai.shapes import OpenAIBatch, batch_of, page_of, status_of
from medley.api.shapes import answer
from medley.db import openai_batches
from medley.db.batches import NewBatch, end_after, open_batch
from medley.db.cancels import cancel_batch
from medley.db.files import BATCH_INPUT, read_file
from medley.db.quotas import check_queue_room
from medley.rings import CANCEL_TASK, OPENAI_TASK
from medley.spec.errors import Fault
from medley.spec.ids import BATCH, FILE, parse_id, public_id, uuid7

MAX_PAGE, PAGE = 100, 20
MAX_WINDOW_H = 30 * 24
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
MIN_EXPIRES_S, MAX_EXPIRES_S = 3600, 30 * 24 * 3600
_WINDOW = re.compile(r"([1-9]\d{0,3})h")

router = APIRouter(prefix="/openai/v1/batches")


class OutputExpiresAfter(msgspec.Struct, forbid_unknown_fields=True):
    anchor: Annotated[str, Meta(pattern="^created_at$")]
    seconds: Annotated[int, Meta(ge=MIN_EXPIRES_S, le=MAX_EXPIRES_S)]


class OpenAIBatchBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None


@router.post("")
async def create(request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    data, digest = await read_whole(request)
    wanted = read_create(request, digest)
    body = decode_body(data, OpenAIBatchBody)
    window_s = _judge(body)
    file = parse_id(FILE, body.input_file_id)

    def act(conn: Connection) -> tuple[Row[Any], bool]:
        batch = uuid7()
        existing = wanted.claim(conn, who.tenant.id, batch)
        if existing is None:
            _make(conn, who, batch, body, window_s, file)
        row = openai_batches.read_openai_batch(conn, existing or batch)
        assert row is not None
        return row, existing is not None

    row, is_replay = await who.services.sql.run(who.tenant.id, act)
    if not is_replay:
        who.services.ringer.send_task(OPENAI_TASK, row.id.hex)
    return answer(batch_of(row, None), headers=REPLAYED if is_replay else None)


def _make(conn: Connection, who: Caller, batch: UUID, body: OpenAIBatchBody, window_s: int, file: UUID | None) -> None:
    found = None if file is None else read_file(conn, file)
    if file is None or found is None:
        raise NotFound("file", body.input_file_id)
    if found.purpose != BATCH_INPUT:
        wanted = f"a file of the purpose {BATCH_INPUT}"
        raise InvalidRequest.of([Fault(field="input_file_id", got=f"one of {found.purpose}", wanted=wanted)])
    # How many jobs the file holds is known, and reserved, once it has been judged.
    check_queue_room(conn, who.tenant.id, who.tenant.quotas, num_jobs=1)
    open_batch(conn, NewBatch(batch, who.tenant.id, who.services.settings.pool))
    end_after(conn, batch, window_s)
    expires = body.output_expires_after
    new = openai_batches.NewOpenAIBatch(
        endpoint=body.endpoint,
        input_file=file,
        completion_window=body.completion_window,
        metadata=None if body.metadata is None else msgspec.json.encode(body.metadata).decode(),
        output_expires_after_s=None if expires is None else expires.seconds,
    )
    openai_batches.create_openai_batch(conn, batch, who.tenant.id, new)
    who.note(conn, "batch.create", public_id(BATCH, batch), file=body.input_file_id)


def _judge(body: OpenAIBatchBody) -> int:
    """The completion window in seconds. Raises InvalidRequest with every fault."""
    faults = FaultList()
    if body.endpoint not in ENDPOINTS:
        faults.add(Fault(field="endpoint", got=repr(body.endpoint)[:80], wanted=" or ".join(ENDPOINTS)))
    window = _WINDOW.fullmatch(body.completion_window)
    if window is None or int(window[1]) > MAX_WINDOW_H:
        wanted = f"hours from 1h to {MAX_WINDOW_H}h, such as 24h"
        faults.add(Fault(field="completion_window", got=repr(body.completion_window)[:80], wanted=wanted))
    metadata = body.metadata or {}
    if len(metadata) > MAX_METADATA:
        faults.add(Fault(field="metadata", got=f"{len(metadata)} pairs", wanted=f"at most {MAX_METADATA}"))
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS or "\0" in key + value:
            wanted = f"keys of 1 to {MAX_KEY_CHARS} and values of at most {MAX_VALUE_CHARS} characters, without NUL"
            faults.add(Fault(field=f"metadata.{key[:MAX_KEY_CHARS]}", got=repr(value)[:80], wanted=wanted))
    faults.raise_any()
    assert window is not None
    return int(window[1]) * 3600


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    query = Query(request)
    limit = query.whole("limit", PAGE, low=1, high=MAX_PAGE)
    after = None
    if (text := query.text("after")) is not None:
        after = parse_id(BATCH, text)
        if after is None:
            query.refuse("after", "the id of a batch")
    query.end()

    def act(conn: Connection) -> Sequence[Row[Any]]:
        return openai_batches.list_openai_batches(conn, after=after, limit=limit + 1)

    rows = await who.services.sql.run(who.tenant.id, act)
    return answer(page_of([await _shown(who, row) for row in rows], limit))


@router.get("/{batch_id}")
async def read(batch_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    batch = _parse(batch_id)

    row = await who.services.sql.run(who.tenant.id, lambda conn: _read(conn, batch, batch_id))
    return answer(await _shown(who, row))


@router.post("/{batch_id}/cancel")
async def cancel(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    """Keeps what has finished. Raises Conflict for a batch at its end."""
    Query(request).end()
    batch = _parse(batch_id)

    def act(conn: Connection) -> Row[Any]:
        row = _read(conn, batch, batch_id)
        if row.state in openai_batches.ENDS:
            raise Conflict(f"the batch {batch_id} cannot be cancelled: it is {status_of(row)}")
        if cancel_batch(conn, batch):
            who.note(conn, "batch.cancel", batch_id)
        openai_batches.hasten_step(conn, batch)
        return _read(conn, batch, batch_id)

    row = await who.services.sql.run(who.tenant.id, act)
    who.services.ringer.ring_done(batch)
    who.services.ringer.send_task(CANCEL_TASK, batch.hex)
    who.services.ringer.send_task(OPENAI_TASK, batch.hex)
    return answer(await _shown(who, row))


async def _shown(who: Caller, row: Row[Any]) -> OpenAIBatch:
    return batch_of(row, await who.services.request_counts.of(who.tenant.id, row))


def _parse(batch_id: str) -> UUID:
    batch = parse_id(BATCH, batch_id)
    if batch is None:
        raise NotFound("batch", batch_id)
    return batch


def _read(conn: Connection, batch: UUID, batch_id: str) -> Row[Any]:
    row = openai_batches.read_openai_batch(conn, batch)
    if row is None:
        raise NotFound("batch", batch_id)
    return row
