"""/v1/sweeps: prompts x adapters declared once; made, found again by name, extended, read."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from medley.api.auth import Caller, reads, submits
from medley.api.batches import page_of
from medley.api.bodies import read_whole
from medley.api.decoding import Query
from medley.api.errors import Conflict, FaultList, NotFound
from medley.api.extending import add_to_sweep, declare_again, judge_size, match_columns, resolve_prompts
from medley.api.idempotency import REPLAYED, Create, read_create
from medley.api.shapes import Column, Sweep, answer, sweep_of
from medley.api.sweep_bodies import SweepRequest, read_extension, read_sweep
from medley.db.batches import PRIORITIES, NewBatch, list_sweeps, read_batch
from medley.db.connections import violated_constraint
from medley.db.quotas import check_queue_room, reserve
from medley.db.sweeps import NewSweep, create_sweep, find_sweep, prompt_bytes, read_columns
from medley.rings import EXPAND_TASK
from medley.spec.ids import REVISION, SWEEP, parse_id, public_id, uuid7
from medley.spec.sampling import SEED_LIMIT

router = APIRouter(prefix="/v1/sweeps")


@router.post("")
async def create(request: Request, who: Caller = Depends(submits)) -> Response:
    """201 for a new sweep; 200 for the one of that name, which goes on, with whatever this definition adds to it."""
    Query(request).end()
    data, digest = await read_whole(request)
    wanted = read_create(request, digest)
    asked = await who.services.sql.call(lambda: read_sweep(data, who.services.settings.limits))
    max_cells, pool = who.services.settings.limits.max_jobs_per_request, who.services.settings.pool

    def act(conn: Connection) -> tuple[Sweep, Made]:
        sweep, made = _create(conn, who, pool, wanted, asked, max_cells)
        return read_shown(conn, sweep), made

    try:
        sweep, made = await who.services.sql.run_bulk(who.tenant.id, act)
    except IntegrityError as first:
        if not _is_name_taken(first):
            raise
        # Another request took the name between our look and our write; now it is there to be found.
        try:
            sweep, made = await who.services.sql.run_bulk(who.tenant.id, act)
        except IntegrityError as second:
            if not _is_name_taken(second):
                raise
            message = f"the last sweep {asked.name!r} is kept no longer and is being removed; try again in a minute"
            raise Conflict(message) from None
    if made in (Made.NEW, Made.MORE):
        who.services.ringer.send_task(EXPAND_TASK, sweep.id.removeprefix("sweep_"))
    status = 201 if made in (Made.NEW, Made.REPLAY) else 200
    return answer(sweep, status, REPLAYED if made is Made.REPLAY else None)


def _is_name_taken(error: IntegrityError) -> bool:
    return violated_constraint(error) == "sweeps_tenant_id_name_key"


@router.post("/{sweep_id}/extend")
async def extend(sweep_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    """Adds prompts, adapters and seeds; what is there already is no fault, and only missing cells run.

    Sent twice it adds nothing the second time, so it takes no idempotency key.
    """
    Query(request).end()
    data, _ = await read_whole(request)
    sweep = await with_sweep(who, sweep_id, lambda _, found: found)  # another's sweep has no wrong body
    limits = who.services.settings.limits
    asked = await who.services.sql.call(lambda: read_extension(data, limits))

    def act(conn: Connection) -> tuple[Sweep, int]:
        num_new = add_to_sweep(conn, who, sweep, asked, limits.max_jobs_per_request)
        return read_shown(conn, sweep), num_new

    shown, num_new = await who.services.sql.run_bulk(who.tenant.id, act)
    if num_new:
        who.services.ringer.send_task(EXPAND_TASK, shown.id.removeprefix("sweep_"))
    return answer(shown)


class Made(Enum):
    """What a create has come to."""

    NEW = "new"
    SAME = "same"  # the sweep is there and goes on
    MORE = "more"  # it is there and has more cells now
    REPLAY = "replay"  # this request was answered before


def _create(
    conn: Connection, who: Caller, pool: str, wanted: Create, asked: SweepRequest, max_cells: int
) -> tuple[UUID, Made]:
    tenant = who.tenant
    existing = find_sweep(conn, asked.name)
    sweep = uuid7() if existing is None else existing.id
    replayed = wanted.claim(conn, tenant.id, sweep)
    if replayed is not None:
        return replayed, Made.REPLAY
    if existing is not None:
        num_new = declare_again(conn, who, existing, asked, max_cells)
        return sweep, Made.MORE if num_new else Made.SAME
    faults = FaultList()
    columns = match_columns(conn, tenant, asked.patterns, faults, include_base=asked.include_base)
    prompts = resolve_prompts(asked.prompts, tenant, {c.adapter for c in columns}, faults)
    faults.raise_any()
    new = NewSweep(
        name=asked.name,
        definition_sha256=asked.definition_sha256,
        sampling=asked.sampling,
        seeds=asked.seeds or [secrets.randbelow(SEED_LIMIT)],
        prompts=prompts,
        columns=columns,
    )
    judge_size(new.num_cells, max_cells, low=1)
    batch = NewBatch(sweep, tenant.id, pool, asked.name, PRIORITIES[asked.priority], asked.deadline_at)
    check_queue_room(conn, tenant.id, tenant.quotas, num_jobs=new.num_cells)
    create_sweep(conn, batch, new)
    num_bytes = prompt_bytes(prompts)
    reserve(conn, tenant.id, tenant.quotas, sweep, num_jobs=new.num_cells, num_bytes=num_bytes)
    who.note(conn, "sweep.create", public_id(SWEEP, sweep), name=asked.name, num_jobs=new.num_cells)
    return sweep, Made.NEW


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    before, limit = page_of(request)
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_sweeps(conn, before=before, limit=limit))
    sweeps = [sweep_of(row, msgspec.UNSET) for row in rows]
    return answer({"sweeps": sweeps, "next": sweeps[-1].id if len(sweeps) == limit else None})


@router.get("/{sweep_id}")
async def read(sweep_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(await with_sweep(who, sweep_id, read_shown))


def read_shown(conn: Connection, sweep: UUID) -> Sweep:
    row = read_batch(conn, sweep)
    assert row is not None
    return sweep_of(row, _shown_columns(read_columns(conn, sweep)))


def _shown_columns(rows: Sequence[Row[Any]]) -> list[Column]:
    return [Column(r.adapter, None if r.revision_id is None else public_id(REVISION, r.revision_id)) for r in rows]


async def with_sweep(who: Caller, sweep_id: str, act: Callable[[Connection, UUID], Any]) -> Any:
    """`act` on the sweep that an id or a name means, in one transaction. Raises NotFound."""
    return await who.services.sql.run(who.tenant.id, lambda conn: act(conn, find(conn, sweep_id)))


def find(conn: Connection, sweep_id: str) -> UUID:
    """The caller's sweep that an id or a name means. Raises NotFound."""
    sweep = parse_id(SWEEP, sweep_id)
    if sweep is None:
        row = find_sweep(conn, sweep_id) if "\0" not in sweep_id else None
        sweep = None if row is None else row.id
    elif (batch := read_batch(conn, sweep)) is None or batch.sweep_name is None:
        sweep = None
    if sweep is None:
        raise NotFound("sweep", sweep_id)
    return sweep
