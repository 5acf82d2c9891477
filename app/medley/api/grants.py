"""Sharing: /v1/adapters/{name}/grants for the owner, /v1/shared-adapters for those with whom something is shared."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row
from sqlalchemy.exc import IntegrityError

from medley.api.auth import Caller, adapts, reads
from medley.api.bodies import read_whole
from medley.api.decoding import Query, decode_body
from medley.api.errors import InvalidRequest, NotFound
from medley.api.job_bodies import shown_value
from medley.api.shapes import answer, grant_of, shared_adapter_of
from medley.db.adapters import NAME, read_adapter, read_revisions
from medley.db.grants import add_grant, list_grants, list_shared, read_grant, read_shared, revoke_grants
from medley.spec.errors import Fault
from medley.spec.ids import REVISION, parse_id

MAX_GRANTS = 1_000  # of one adapter
MAX_PAGE = 10_000
PAGE = 1_000
_TENANT = "the name of another tenant"

router = APIRouter(prefix="/v1")


class GrantBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """With whom to share. `revision` None: every revision, those to come too."""

    tenant: str
    revision: str | None = None


@router.post("/adapters/{name}/grants")
async def share(name: str, request: Request, who: Caller = Depends(adapts)) -> Response:
    """201 for a new grant, 200 for one that was there."""
    Query(request).end()
    data, _ = await read_whole(request)
    await who.services.sql.run(who.tenant.id, lambda conn: _own(conn, name))  # another's adapter has no wrong body
    body = decode_body(data, GrantBody)

    def act(conn: Connection) -> tuple[Row[Any] | None, bool]:
        adapter = _own(conn, name)
        faults = []
        if not body.tenant or body.tenant == who.tenant.name or "\0" in body.tenant:
            faults.append(_unknown_tenant(body.tenant))
        revision = None if body.revision is None else _revision(conn, adapter, body.revision)
        if body.revision is not None and revision is None:
            got = shown_value(body.revision)
            faults.append(Fault(field="revision", got=got, wanted="rev_<hex>, a revision of this adapter"))
        if len(list_grants(conn, adapter.id)) >= MAX_GRANTS:
            faults.append(Fault(field="tenant", got="one more", wanted=f"at most {MAX_GRANTS} grants of an adapter"))
        if faults:
            raise InvalidRequest.of(faults)
        grant, is_new = add_grant(conn, who.tenant.id, adapter.id, revision, body.tenant)
        if is_new:
            who.note(conn, "adapter.share", name, tenant=body.tenant, revision=body.revision)
        return read_grant(conn, grant), is_new

    try:
        row, is_new = await who.services.sql.run(who.tenant.id, act)
    except IntegrityError:
        raise InvalidRequest.of([_unknown_tenant(body.tenant)]) from None
    assert row is not None
    return answer(grant_of(row), 201 if is_new else 200)


@router.get("/adapters/{name}/grants")
async def list_all(name: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_grants(conn, _own(conn, name).id))
    return answer({"grants": [grant_of(row) for row in rows]})


@router.delete("/adapters/{name}/grants/{tenant}")
async def revoke(name: str, tenant: str, request: Request, who: Caller = Depends(adapts)) -> Response:
    """Ends every grant of the adapter to the tenant, or that of one revision."""
    query = Query(request)
    text = query.text("revision")
    revision = None if text is None else parse_id(REVISION, text)
    if text is not None and revision is None:
        query.refuse("revision", "rev_<hex>, a revision of this adapter")
    query.end()

    def act(conn: Connection) -> int:
        adapter = _own(conn, name)
        num_ended = 0 if "\0" in tenant else revoke_grants(conn, adapter.id, tenant, revision)
        if num_ended:
            who.note(conn, "adapter.unshare", name, tenant=tenant, revision=text)
        return num_ended

    if not await who.services.sql.run(who.tenant.id, act):
        raise NotFound("grant to", tenant)
    who.services.ring_pool()  # what waits is ended by the dispatcher
    return Response(status_code=204)


@router.get("/shared-adapters")
async def list_theirs(request: Request, who: Caller = Depends(reads)) -> Response:
    """Others' adapters that the caller may use; `after` is the last one's whole name."""
    query = Query(request)
    limit = query.whole("limit", PAGE, low=1, high=MAX_PAGE)
    owner, slash, name = (query.text("after") or "/").partition("/")
    if not slash or "\0" in owner + name:
        query.refuse("after", "an adapter as tenant/name")
    query.end()
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_shared(conn, after=(owner, name), limit=limit))
    adapters = [shared_adapter_of(row, row.num_revisions) for row in rows]
    return answer({"adapters": adapters, "next": adapters[-1].full_name if len(adapters) == limit else None})


@router.get("/shared-adapters/{owner}/{name}")
async def read_theirs(owner: str, name: str, request: Request, who: Caller = Depends(reads)) -> Response:
    """An adapter that is shared with the caller, at the newest revision that is."""
    Query(request).end()
    rows = []
    if NAME.fullmatch(name) and "\0" not in owner:
        found = await who.services.sql.run(who.tenant.id, lambda conn: read_shared(conn, [(owner, name)]))
        rows = found.get((owner, name), [])
    if not rows:
        raise NotFound("adapter", f"{owner}/{name}")
    return answer(shared_adapter_of(rows[0], len(rows)))


def _own(conn: Connection, name: str) -> Row[Any]:
    row = read_adapter(conn, name) if NAME.fullmatch(name) else None
    if row is None:
        raise NotFound("adapter", name)
    return row


def _revision(conn: Connection, adapter: Row[Any], text: str) -> UUID | None:
    wanted = parse_id(REVISION, text)
    return next((row.id for row in read_revisions(conn, adapter.id) if row.id == wanted), None)


def _unknown_tenant(name: str) -> Fault:
    return Fault(field="tenant", got=shown_value(name), wanted=_TENANT)
