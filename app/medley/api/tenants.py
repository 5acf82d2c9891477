"""/v1/tenant: whose key this is."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from medley.api.auth import Caller, caller
from medley.api.decoding import Query
from medley.api.shapes import answer

router = APIRouter(prefix="/v1/tenant")


@router.get("")
async def read(request: Request, who: Caller = Depends(caller)) -> Response:
    Query(request).end()
    return answer({"name": who.tenant.name})
