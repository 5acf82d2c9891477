"""/v1/batches/{id}: what changes a batch after it was made: its priority and deadline, and retries."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET, UnsetType
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, submits
from medley.api.batches import parse_batch, require_batch
from medley.api.bodies import read_whole
from medley.api.decoding import Query, decode_body
from medley.api.errors import Conflict
from medley.api.idempotency import REPLAYED, read_create
from medley.api.job_bodies import At, Priority
from medley.api.shapes import answer, batch_of
from medley.db.batches import PRIORITIES
from medley.db.flags import change_batch
from medley.db.quotas import check_file_room, reserve
from medley.db.retries import NotRetried, Wanted, retry
from medley.spec.errors import RETRYABLE, ErrorCode
from medley.spec.jobs import JobState

router = APIRouter(prefix="/v1/batches")


class ChangeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is absent stays; a null deadline takes it away."""

    priority: Priority | UnsetType = UNSET
    deadline_at: At | UnsetType | None = UNSET


class RetryBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which ends to try again. `codes` (of failures): those listed, or `retryable`; absent, all."""

    states: Annotated[list[Literal["failed", "cancelled", "expired"]], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["failed"]
    )
    codes: list[ErrorCode] | Literal["retryable"] | None = None


@router.patch("/{batch_id}")
async def change(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    """Of what is queued and what runs; what has ended stays as it is."""
    Query(request).end()
    data, _ = await read_whole(request)
    batch = await _find(who, batch_id)
    body = decode_body(data, ChangeBody)
    given = {name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not UNSET}
    changes = given if body.priority is UNSET else given | {"priority": PRIORITIES[body.priority]}

    def act(conn: Connection) -> Row[Any]:
        if changes:
            change_batch(conn, batch, changes)
            who.note(conn, "batch.change", batch_id, **given)
        return require_batch(conn, batch, batch_id)

    row = await who.services.sql.run_bulk(who.tenant.id, act)
    who.services.ring_pool()
    return answer(batch_of(row))


@router.post("/{batch_id}/retry")
async def retry_jobs(batch_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    """New jobs in the same batch for those that ended without a result, each once an end."""
    Query(request).end()
    data, digest = await read_whole(request)
    batch = await _find(who, batch_id)
    wanted = read_create(request, digest)
    body = decode_body(data or b"{}", RetryBody)
    codes = sorted(RETRYABLE) if body.codes == "retryable" else body.codes
    states = [JobState(state) for state in body.states]

    def act(conn: Connection) -> tuple[Row[Any], bool]:
        is_replay = wanted.claim(conn, who.tenant.id, batch) is not None
        if not is_replay:
            try:
                made = retry(conn, batch, Wanted(states, codes))
            except NotRetried as error:
                raise Conflict(f"{batch_id} is not retried: {error}") from error
            if made.num_jobs:
                who.note(conn, "batch.retry", batch_id, num_jobs=made.num_jobs)
                tenant = who.tenant
                check_file_room(conn, tenant.id, tenant.quotas, num_bytes=made.num_file_bytes)
                reserve(conn, tenant.id, tenant.quotas, batch, num_jobs=made.num_jobs, num_bytes=made.num_bytes)
        return require_batch(conn, batch, batch_id), is_replay

    row, is_replay = await who.services.sql.run_bulk(who.tenant.id, act)
    if not is_replay:
        who.services.ring_pool()
    return answer(batch_of(row), 200, REPLAYED if is_replay else None)


async def _find(who: Caller, batch_id: str) -> UUID:
    """The caller's batch, before its body is judged: another's has no wrong body. Raises NotFound."""
    batch = parse_batch(batch_id)
    await who.services.sql.run(who.tenant.id, lambda conn: require_batch(conn, batch, batch_id))
    return batch
