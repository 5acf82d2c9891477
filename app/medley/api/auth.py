"""Who calls: the tenant behind a bearer key, remembered for a few seconds.

A revoked key works for `CACHE_S` seconds more at the most. Keys are remembered by their hash alone.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from medley.api.errors import Unauthorized
from medley.api.sql import Sql
from medley.db.tenants import Tenant, authenticate

if TYPE_CHECKING:
    from medley.api.services import Services

CACHE_S = 5.0
MAX_CACHED = 10_000
MAX_KEY_LEN = 200


class Authenticator:
    """Looks keys up, at most once in `CACHE_S` seconds each."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._known: dict[bytes, tuple[Tenant, float]] = {}

    async def tenant(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_LEN:
            raise Unauthorized
        digest = hashlib.sha256(key.encode()).digest()
        known = self._known.get(digest)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        tenant = await self._sql.run_unbound(lambda conn: authenticate(conn, key))
        if tenant is None:
            self._known.pop(digest, None)
            raise Unauthorized
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (tenant, time.monotonic() + CACHE_S)
        return tenant


@dataclass(frozen=True)
class Caller:
    """The tenant of a request, and what serves it."""

    tenant: Tenant
    services: Services


async def caller(request: Request) -> Caller:
    """Dependency of every endpoint that concerns a tenant. Raises Unauthorized."""
    services: Services = request.app.state.services
    return Caller(await services.auth.tenant(request.headers.get("authorization")), services)
