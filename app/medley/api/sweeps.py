"""/v1/sweeps: prompts x adapters declared once; made, found again by name, read."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from medley.api.auth import Caller, reads, submits
from medley.api.batches import page_of
from medley.api.bodies import read_whole
from medley.api.decoding import Query
from medley.api.errors import Conflict, FaultList, NotFound
from medley.api.idempotency import REPLAYED, Create, read_create
from medley.api.job_bodies import shown_value
from medley.api.shapes import Column, Sweep, answer, sweep_of
from medley.api.sweep_bodies import SweepRequest, read_sweep
from medley.db.adapters import list_adapters
from medley.db.batches import PRIORITIES, NewBatch, list_sweeps, read_batch
from medley.db.grants import list_shared
from medley.db.quotas import check_queue_room, reserve
from medley.db.sweeps import NewSweep, SweepColumn, SweepPrompt, create_sweep, find_sweep, read_columns
from medley.db.tenants import Tenant
from medley.rings import EXPAND_TASK
from medley.spec.errors import Fault
from medley.spec.ids import REVISION, SWEEP, parse_id, public_id, uuid7
from medley.spec.sampling import SEED_LIMIT

MAX_ADAPTERS = 100_000  # of one tenant, that patterns are matched against

router = APIRouter(prefix="/v1/sweeps")


@router.post("")
async def create(request: Request, who: Caller = Depends(submits)) -> Response:
    """201 for a new sweep; 200 for the one of that name with the same definition, which goes on."""
    Query(request).end()
    data, digest = await read_whole(request)
    wanted = read_create(request, digest)
    asked = await who.services.sql.call(lambda: read_sweep(data, who.services.settings.limits))
    max_cells, pool = who.services.settings.limits.max_jobs_per_request, who.services.settings.pool

    def act(conn: Connection) -> tuple[Sweep, bool, bool]:
        sweep, is_new, is_replay = _create(conn, who.tenant, pool, wanted, asked, max_cells)
        return _read(conn, sweep), is_new, is_replay

    try:
        sweep, is_new, is_replay = await who.services.sql.run_bulk(who.tenant.id, act)
    except IntegrityError as first:
        if not _is_name_taken(first):
            raise
        # Another request took the name between our look and our write; now it is there to be found.
        try:
            sweep, is_new, is_replay = await who.services.sql.run_bulk(who.tenant.id, act)
        except IntegrityError as second:
            if not _is_name_taken(second):
                raise
            message = f"the last sweep {asked.name!r} is kept no longer and is being removed; try again in a minute"
            raise Conflict(message) from None
    if is_new:
        who.services.ringer.send_task(EXPAND_TASK, sweep.id.removeprefix("sweep_"))
    return answer(sweep, 201 if is_new or is_replay else 200, REPLAYED if is_replay else None)


def _is_name_taken(error: IntegrityError) -> bool:
    constraint = error.orig.diag.constraint_name if isinstance(error.orig, psycopg.Error) else None
    return constraint == "sweeps_tenant_id_name_key"


def _create(
    conn: Connection, tenant: Tenant, pool: str, wanted: Create, asked: SweepRequest, max_cells: int
) -> tuple[UUID, bool, bool]:
    """(sweep, whether it is new, whether the request is a replay)."""
    existing = find_sweep(conn, asked.name)
    sweep = uuid7() if existing is None else existing.id
    replayed = wanted.claim(conn, tenant.id, sweep)
    if replayed is not None:
        return replayed, False, True
    if existing is not None:
        if bytes(existing.definition_sha256) != asked.definition_sha256:
            raise Conflict(f"the sweep {asked.name!r} exists with another definition; take another name")
        return sweep, False, False
    faults = FaultList()
    columns = _columns(conn, tenant, asked, faults)
    prompts = _prompts(asked, tenant, {c.adapter for c in columns}, faults)
    faults.raise_any()
    new = NewSweep(
        name=asked.name,
        definition_sha256=asked.definition_sha256,
        sampling=asked.sampling,
        seeds=asked.seeds or [secrets.randbelow(SEED_LIMIT)],
        prompts=prompts,
        columns=columns,
    )
    if not 1 <= new.num_cells <= max_cells:
        faults.add(Fault(field="prompts", got=f"{new.num_cells} jobs in all", wanted=f"1 to {max_cells}"))
        faults.raise_any()
    batch = NewBatch(sweep, tenant.id, pool, asked.name, PRIORITIES[asked.priority], asked.deadline_at)
    check_queue_room(conn, tenant.id, tenant.quotas, num_jobs=new.num_cells)
    create_sweep(conn, batch, new)
    reserve(conn, tenant.id, tenant.quotas, sweep, num_jobs=new.num_cells, num_bytes=new.num_bytes)
    return sweep, True, False


def _columns(conn: Connection, tenant: Tenant, asked: SweepRequest, faults: FaultList) -> list[SweepColumn]:
    """The adapters that the patterns match, by name, at their newest revisions; then the base."""
    own = list_adapters(conn, limit=MAX_ADAPTERS) if asked.patterns else []
    named = [(row.name, f"{tenant.name}/{row.name}", row) for row in own]
    # Others' adapters go by their whole name alone, so that a pattern without a tenant never takes them.
    shared = list_shared(conn, limit=MAX_ADAPTERS) if any("/" in pattern for pattern in asked.patterns) else []
    named += [(f"{row.owner}/{row.name}", f"{row.owner}/{row.name}", row) for row in shared]
    chosen: dict[str, SweepColumn] = {}
    for i, pattern in enumerate(asked.patterns):
        matched = [
            (label, row)
            for label, full_name, row in named
            if ("/" in pattern and fnmatchcase(full_name, pattern))
            or ("/" not in label and fnmatchcase(label, pattern))
        ]
        if not matched:
            wanted = "a name or pattern that matches an adapter of yours, or one that is shared with you"
            faults.add(Fault(field=f"adapters[{i}]", got=shown_value(pattern), wanted=wanted))
        for label, row in matched:
            if row.quarantined_at is not None:
                got = f"{label}, which is quarantined"
                wanted = "adapters whose newest revision is not; upload a corrected one"
                faults.add(Fault(field=f"adapters[{i}]", got=got, wanted=wanted))
            chosen[label] = SweepColumn(label, row.revision_id)
    base = [SweepColumn(None, None)] if asked.include_base else []
    return [chosen[name] for name in sorted(chosen)] + base


def _prompts(asked: SweepRequest, tenant: Tenant, columns: set[str | None], faults: FaultList) -> list[SweepPrompt]:
    prompts = []
    for i, body in enumerate(asked.prompts):
        only = None if body.adapter is None else body.adapter.removeprefix(f"{tenant.name}/")
        if only is not None and only not in columns:
            wanted = "an adapter that the sweep's patterns match"
            faults.add(Fault(field=f"prompts[{i}].adapter", got=shown_value(body.adapter), wanted=wanted))
        prompts.append(
            SweepPrompt(body.prompt, body.prompt_token_ids, body.expected, body.custom_id, only, *body.scored)
        )
    return prompts


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    before, limit = page_of(request)
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_sweeps(conn, before=before, limit=limit))
    sweeps = [sweep_of(row, msgspec.UNSET) for row in rows]
    return answer({"sweeps": sweeps, "next": sweeps[-1].id if len(sweeps) == limit else None})


@router.get("/{sweep_id}")
async def read(sweep_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(await with_sweep(who, sweep_id, _read))


def _read(conn: Connection, sweep: UUID) -> Sweep:
    row = read_batch(conn, sweep)
    assert row is not None
    return sweep_of(row, _shown_columns(read_columns(conn, sweep)))


def _shown_columns(rows: Sequence[Row[Any]]) -> list[Column]:
    return [Column(r.adapter, None if r.revision_id is None else public_id(REVISION, r.revision_id)) for r in rows]


async def with_sweep(who: Caller, sweep_id: str, act: Callable[[Connection, UUID], Any]) -> Any:
    """`act` on the sweep that an id or a name means, in one transaction. Raises NotFound."""

    def find_and_act(conn: Connection) -> Any:
        sweep = parse_id(SWEEP, sweep_id)
        if sweep is None:
            row = find_sweep(conn, sweep_id) if "\0" not in sweep_id else None
            sweep = None if row is None else row.id
        elif (batch := read_batch(conn, sweep)) is None or batch.sweep_name is None:
            sweep = None
        if sweep is None:
            raise NotFound("sweep", sweep_id)
        return act(conn, sweep)

    return await who.services.sql.run(who.tenant.id, find_and_act)
