"""/v1/limits: what the caller's tenant may have, and what it has."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter, Depends, Request, Response

from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.shapes import answer
from medley.db.quotas import read_use

router = APIRouter(prefix="/v1/limits")


@router.get("")
async def read(request: Request, who: Caller = Depends(reads)) -> Response:
    """Of the tenant, and of one request."""
    Query(request).end()
    use = await who.services.sql.run(who.tenant.id, lambda conn: read_use(conn, who.tenant.id))
    used = dataclasses.asdict(use)
    quotas = {
        name: {"limit": limit, "used": used.get(name)} for name, limit in dataclasses.asdict(who.tenant.quotas).items()
    }
    return answer({"tenant": who.tenant.name, "quotas": quotas, "request": who.services.settings.limits})
