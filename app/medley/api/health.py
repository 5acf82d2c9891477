"""/livez and /readyz: whether the process lives, and whether it can serve.

Redis carries rings alone, so a dead one is reported and does not make the service unready.
"""

from __future__ import annotations

import asyncio

import redis
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from medley.api.auth import anyone
from medley.api.services import Services
from medley.api.shapes import answer
from medley.db.migrate import is_current
from medley.rings import connect

CHECK_TIMEOUT_S = 5.0

router = APIRouter()


@router.get("/livez", dependencies=[Depends(anyone)])
async def live() -> Response:
    return answer({"live": True})


@router.get("/readyz", dependencies=[Depends(anyone)])
async def ready(request: Request) -> Response:
    services: Services = request.app.state.services
    (postgres, migrations), has_redis = await asyncio.gather(_check_database(services), _check_redis(services))
    body = {"postgres": postgres, "migrations": migrations, "redis": has_redis, "model": services.base is not None}
    return answer(body, 200 if postgres and migrations else 503)


async def _check_database(services: Services) -> tuple[bool, bool]:
    def act(conn: Connection) -> bool:
        conn.execute(text("SELECT 1"))
        return is_current(conn)

    try:
        return True, await asyncio.wait_for(services.sql.run_unbound(act), CHECK_TIMEOUT_S)
    except (SQLAlchemyError, TimeoutError):
        return False, False


async def _check_redis(services: Services) -> bool:
    def ping() -> bool:
        with connect(services.settings.redis_url) as client:
            return bool(client.ping())

    try:
        return await services.sql.call(ping)
    except (redis.RedisError, OSError):
        return False
