"""/v1/tenant: whose key this is, how long its data is kept; and its deletion."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from medley.api.auth import Caller, administers, reads
from medley.api.decoding import Query
from medley.api.errors import Unauthorized
from medley.api.shapes import answer
from medley.db.erasure import Closing, close
from medley.db.retention import read_retention
from medley.rings import MAINTAIN_TASK

# Between the request over HTTP and the erasure: a key that was stolen destroys nothing that cannot be called off.
GRACE_DAYS = 7

router = APIRouter(prefix="/v1/tenant")


@router.get("")
async def read(request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    days = await who.services.sql.run(who.tenant.id, lambda conn: read_retention(conn, who.tenant.id))
    if days is None:  # deleted since its key was looked up
        raise Unauthorized
    return answer({"name": who.tenant.name, "retention_days": days})


@router.delete("")
async def delete(request: Request, who: Caller = Depends(administers)) -> Response:
    """202: closed now, erased after `GRACE_DAYS`. `?confirm=` has to name the tenant."""
    query = Query(request)
    if query.text("confirm") != who.tenant.name:
        query.refuse("confirm", "the tenant's name, as this cannot be taken back over HTTP")
    query.end()

    def act(conn: Connection) -> Closing:
        who.note(conn, "tenant.delete", who.tenant.name, grace_days=GRACE_DAYS)
        return close(conn, who.tenant.id, grace_s=GRACE_DAYS * 86_400)

    closing = await who.services.sql.run(who.tenant.id, act)
    who.services.auth.forget(who.tenant.id)
    who.services.ringer.send_task(MAINTAIN_TASK)  # it stops what runs
    return answer({"name": closing.name, "delete_due_at": closing.due_at}, 202)
