"""/v1/jobs: one job made, read, waited for, cancelled. A job by itself is a batch of one."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET
from sqlalchemy import Connection, Row

from medley.api.adapter_refs import resolve_refs
from medley.api.auth import Caller, reads, submits
from medley.api.bodies import read_whole
from medley.api.creating import BatchOptions, Created, create_jobs
from medley.api.decoding import Query, decode_fields
from medley.api.errors import InvalidRequest, NotFound
from medley.api.idempotency import REPLAYED, read_create
from medley.api.job_bodies import SAMPLES_ELSEWHERE, Defaults, SingleJob
from medley.api.job_columns import JobReader, at_top
from medley.api.shapes import answer, job_of
from medley.db.batches import PRIORITIES
from medley.db.flags import cancel_job
from medley.db.results import read_job
from medley.spec.errors import Fault
from medley.spec.ids import JOB, parse_id
from medley.spec.jobs import JobState

MAX_WAIT_S = 60.0

router = APIRouter(prefix="/v1/jobs")


@router.post("")
async def create(request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    body, digest = await read_whole(request)
    wanted = read_create(request, digest)
    found = decode_fields(body, SingleJob)
    if found.value is None:
        raise InvalidRequest.of(found.faults)
    if found.value.n is not UNSET and found.value.n > 1:
        found.faults.append(Fault(field="n", got=str(found.value.n), wanted=SAMPLES_ELSEWHERE))
        found.value.n = 1
    options = BatchOptions(
        name=None, priority=PRIORITIES[found.value.priority], deadline_at=found.value.deadline_at, is_single=True
    )
    limits, pool = who.services.settings.limits, who.services.settings.pool

    def act(conn: Connection) -> tuple[Created, Row[Any] | None]:
        reader = JobReader(Defaults(), limits, lambda refs: resolve_refs(conn, who.tenant.name, refs), at_top)
        # Lazily, as the key comes first: a replay is answered even where the adapter is gone by now.
        chunks = (reader.read_one(found) for _ in range(1))
        created = create_jobs(conn, who.tenant, pool, wanted, options, reader, chunks, num_sent=1)
        assert created.job_ids is not None
        return created, read_job(conn, created.job_ids[0])

    created, row = await who.services.sql.run(who.tenant.id, act)
    assert row is not None
    if not created.is_replay:
        who.services.ring_pool()
    return answer(job_of(row), 201, REPLAYED if created.is_replay else None)


@router.get("/{job_id}")
async def read(job_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    query = Query(request)
    wait_s = query.seconds("wait", high=MAX_WAIT_S)
    query.end()
    job = _parse(job_id)
    row = await _read(who, job, job_id)
    if wait_s > 0 and not JobState(row.state).is_terminal:
        with who.services.hub.watch(who.tenant.id, row.batch_id, job=job) as watch:
            await watch.wait(wait_s)
        row = await _read(who, job, job_id)
    return answer(job_of(row))


@router.post("/{job_id}/cancel")
async def cancel(job_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    job = _parse(job_id)

    def act(conn: Connection) -> Row[Any]:
        if read_job(conn, job) is None:
            raise NotFound("job", job_id)
        if cancel_job(conn, job):
            who.note(conn, "job.cancel", job_id)
        row = read_job(conn, job)
        assert row is not None
        return row

    row = await who.services.sql.run(who.tenant.id, act)
    who.services.ringer.ring_done(row.batch_id)
    return answer(job_of(row))


def _parse(job_id: str) -> UUID:
    job = parse_id(JOB, job_id)
    if job is None:
        raise NotFound("job", job_id)
    return job


async def _read(who: Caller, job: UUID, job_id: str) -> Row[Any]:
    row = await who.services.job_reads.read(who.tenant.id, job)
    if row is None:
        raise NotFound("job", job_id)
    return row
