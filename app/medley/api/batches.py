"""/v1/batches: many jobs made at once, from a JSON array or a file of lines; counts, flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.adapter_refs import resolve_refs
from medley.api.auth import Caller, reads, submits
from medley.api.bodies import read_whole, spool, whole_lines
from medley.api.creating import BatchOptions, Created, create_jobs
from medley.api.decoding import Partial, Query, decode_fields
from medley.api.errors import FaultList, InvalidRequest, NotFound
from medley.api.idempotency import REPLAYED, Create, read_create
from medley.api.job_bodies import At, Defaults, Priority, label_faults
from medley.api.job_columns import CHUNK_JOBS, JobReader, at_item, at_line
from medley.api.shapes import NDJSON, answer, batch_of
from medley.db.batches import PRIORITIES, list_batches, read_batch
from medley.db.cancels import cancel_batch
from medley.db.flags import pause_batch, resume_batch
from medley.db.new_jobs import JobColumns
from medley.rings import CANCEL_TASK
from medley.spec.errors import Fault
from medley.spec.ids import BATCH, JOB, SWEEP, parse_id, public_id

MAX_PAGE = 1_000
PAGE = 100
# The bytes of a prompt and of a continuation as JSON may escape them, or as token ids; and a job's other fields.
LINE_BYTES_A_PROMPT_BYTE = 12
LINE_OVERHEAD_BYTES = 256 << 10

_FLAGS: dict[Callable[[Connection, UUID], bool], str] = {
    cancel_batch: "cancel",
    pause_batch: "pause",
    resume_batch: "resume",
}

router = APIRouter(prefix="/v1/batches")
Chunks = Callable[[JobReader], Iterable[list[JobColumns]]]


class BatchBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A batch as JSON. Jobs stay raw until they are written, chunk by chunk."""

    jobs: list[msgspec.Raw]
    name: str | None = None
    priority: Priority = "normal"
    deadline_at: At | None = None
    defaults: msgspec.Raw = msgspec.Raw(b"{}")


@router.post("")
async def create(request: Request, who: Caller = Depends(submits)) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == NDJSON:
        return await _create_from_lines(request, who)
    return await _create_from_array(request, who)


async def _create_from_array(request: Request, who: Caller) -> Response:
    Query(request).end()
    data, digest = await read_whole(request)
    wanted = read_create(request, digest)
    found: Partial[Any] = decode_fields(data, BatchBody)
    faults = FaultList(found.faults)
    if found.value is None:
        raise InvalidRequest.of(faults)
    body = found.value
    defaults = _defaults(body.defaults, faults)
    options = _options(body.name, body.priority, body.deadline_at, faults)

    def chunks(reader: JobReader) -> Iterable[list[JobColumns]]:
        for start in range(0, len(body.jobs), CHUNK_JOBS):
            yield reader.read_items(body.jobs[start : start + CHUNK_JOBS], start)

    return await _create(who, wanted, options, defaults, faults, at_item, chunks)


async def _create_from_lines(request: Request, who: Caller) -> Response:
    query = Query(request)
    name = query.text("name")
    priority = query.text("priority") or "normal"
    if priority not in PRIORITIES:
        query.refuse("priority", " or ".join(PRIORITIES))
        priority = "normal"
    deadline_at = query.typed("deadline_at", At, "a time with its offset, as RFC 3339 has it")
    defaults = _defaults((query.text("defaults") or "{}").encode(), query.faults)
    options = _options(name, priority, deadline_at, query.faults)
    query.end()
    max_line_bytes = LINE_BYTES_A_PROMPT_BYTE * who.services.settings.limits.max_prompt_bytes + LINE_OVERHEAD_BYTES
    spooled = await spool(request)
    try:
        wanted = read_create(request, spooled.sha256)

        def chunks(reader: JobReader) -> Iterable[list[JobColumns]]:
            for lines, first_line in whole_lines(spooled.file, max_line_bytes):
                yield reader.read_lines(lines, first_line)

        return await _create(who, wanted, options, defaults, FaultList(), at_line, chunks)
    finally:
        spooled.close()


async def _create(
    who: Caller,
    wanted: Create,
    options: BatchOptions,
    defaults: Any,
    faults: FaultList,
    locate: Callable[[int, Fault], Fault],
    chunks: Chunks,
) -> Response:
    settings = who.services.settings

    def act(conn: Connection) -> tuple[Created, Row[Any] | None]:
        reader = JobReader(defaults, settings.limits, lambda refs: resolve_refs(conn, who.tenant.name, refs), locate)
        reader.faults.extend(faults.listed)
        created = create_jobs(conn, who.tenant, settings.pool, wanted, options, reader, chunks(reader))
        if not created.is_replay:
            who.note(conn, "batch.create", public_id(BATCH, created.batch), num_jobs=reader.num_jobs)
        return created, read_batch(conn, created.batch)

    created, row = await who.services.sql.run_bulk(who.tenant.id, act)
    assert row is not None
    batch = batch_of(row)
    if created.job_ids is not None:
        batch.job_ids = [public_id(JOB, job) for job in created.job_ids]
    if not created.is_replay:
        who.services.ring_pool()
    return answer(batch, 201, REPLAYED if created.is_replay else None)


def _defaults(data: bytes | msgspec.Raw, faults: FaultList) -> Any:
    found = decode_fields(data, Defaults)
    faults.extend(msgspec.structs.replace(f, field=f"defaults.{f.field}") for f in found.faults)
    return found.value or Defaults()


def _options(name: str | None, priority: str, deadline_at: Any, faults: FaultList) -> BatchOptions:
    faults.extend(label_faults("name", name))
    return BatchOptions(name=name, priority=PRIORITIES[priority], deadline_at=deadline_at)


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    before, limit = page_of(request)
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_batches(conn, before=before, limit=limit))
    batches = [batch_of(row) for row in rows]
    return answer({"batches": batches, "next": batches[-1].id if len(batches) == limit else None})


@router.get("/{batch_id}")
async def read(batch_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(batch_of(await _act(who, batch_id, None)))


@router.post("/{batch_id}/cancel")
async def cancel(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    row = await _act(who, batch_id, cancel_batch)
    who.services.ringer.ring_done(row.id)
    if row.finished_at is None:
        who.services.ringer.send_task(CANCEL_TASK, row.id.hex)
    return answer(batch_of(row))


@router.post("/{batch_id}/pause")
async def pause(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    return answer(batch_of(await _act(who, batch_id, pause_batch)))


@router.post("/{batch_id}/resume")
async def resume(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    row = await _act(who, batch_id, resume_batch)
    who.services.ring_pool()
    return answer(batch_of(row))


async def _act(who: Caller, batch_id: str, flag: Callable[[Connection, UUID], bool] | None) -> Row[Any]:
    """The batch's row, after `flag` where there is one. A flag on a finished batch changes nothing."""
    batch = parse_batch(batch_id)

    def act(conn: Connection) -> Row[Any]:
        row = require_batch(conn, batch, batch_id)
        if flag is None:
            return row
        if flag(conn, batch):
            who.note(conn, f"batch.{_FLAGS[flag]}", batch_id)
        return require_batch(conn, batch, batch_id)

    return await who.services.sql.run(who.tenant.id, act)


def parse_batch(batch_id: str) -> UUID:
    """The batch that a batch_ or sweep_ id names. Raises NotFound."""
    batch = parse_id(BATCH, batch_id) or parse_id(SWEEP, batch_id)
    if batch is None:
        raise NotFound("batch", batch_id)
    return batch


def require_batch(conn: Connection, batch: UUID, shown_id: str) -> Row[Any]:
    """The row of a batch of the caller's. Raises NotFound."""
    row = read_batch(conn, batch)
    if row is None:
        raise NotFound("batch", shown_id)
    return row


def page_of(request: Request) -> tuple[UUID | None, int]:
    """(before, limit) of a listing, newest first."""
    query = Query(request)
    limit = query.whole("limit", PAGE, low=1, high=MAX_PAGE)
    before = None
    if (text := query.text("before")) is not None:
        before = parse_id(BATCH, text) or parse_id(SWEEP, text)
        if before is None:
            query.refuse("before", "the id of a batch or sweep")
    query.end()
    return before, limit
