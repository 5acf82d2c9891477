"""Who calls, and whether he may: the tenant behind a bearer key, remembered for a few seconds, and the key's scopes.

Every endpoint takes one of the dependencies `reads`, `submits`, `adapts`, `administers` or `anyone`, which declare
what it wants. A revoked key works for `CACHE_S` seconds more at the most. Keys are remembered by their hash alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from fastapi import Request
from sqlalchemy import Connection

from medley.api.errors import Forbidden, Unauthorized
from medley.api.sql import Sql
from medley.config import Quotas
from medley.db import audit
from medley.db.keys import public_key_id
from medley.db.tenants import Access, Tenant, authenticate
from medley.spec.scopes import Scope, covers

if TYPE_CHECKING:
    from medley.api.services import Services

CACHE_S = 5.0
MAX_CACHED = 10_000
MAX_KEY_LEN = 200

# What each dependency wants of its caller; None: nothing.
DECLARED: dict[Callable[..., object], Scope | None] = {}


class Authenticator:
    """Looks keys up, at most once in `CACHE_S` seconds each. `quotas`: of tenants without limits of their own."""

    def __init__(self, sql: Sql, quotas: Quotas) -> None:
        self._sql = sql
        self._quotas = quotas
        self._known: dict[bytes, tuple[Access, float]] = {}

    async def access(self, authorization: str | None) -> Access:
        """What an Authorization header opens. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_LEN:
            raise Unauthorized
        digest = hashlib.sha256(key.encode()).digest()
        known = self._known.get(digest)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        asked_at = time.monotonic()
        access = await self._sql.run_unbound(lambda conn: authenticate(conn, key, self._quotas))
        if access is None:
            self._known.pop(digest, None)
            raise Unauthorized
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        left_s = CACHE_S if access.expires_in_s is None else min(CACHE_S, access.expires_in_s)
        self._known[digest] = (access, asked_at + left_s)
        return access

    def forget(self, tenant: UUID) -> None:
        """Looks the tenant's keys up anew, in this process."""
        self._known = {digest: known for digest, known in self._known.items() if known[0].tenant.id != tenant}


@dataclass(frozen=True)
class Caller:
    """The tenant of a request, and what serves it."""

    tenant: Tenant
    services: Services
    actor: audit.Actor = audit.OPERATOR

    def note(self, conn: Connection, action: str, object_: str, **details: object) -> None:
        """Adds to the audit log, in the transaction of what is done."""
        audit.record(conn, self.tenant.id, self.actor, action, object_, details)


async def caller(request: Request) -> Caller:
    """Whoever has a key, whatever its scopes. Raises Unauthorized, RateLimited."""
    who, _ = await _known_caller(request)
    return who


async def _known_caller(request: Request) -> tuple[Caller, Access]:
    services: Services = request.app.state.services
    access = await services.auth.access(request.headers.get("authorization"))
    await services.rates.admit(access.tenant)
    actor = audit.Actor(
        key_id=access.tenant.key_id,
        request_id=request.scope.get("medley.request_id"),
        client_address=request.client.host if request.client else None,
    )
    return Caller(access.tenant, services, actor), access


def wants(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of an endpoint that only keys with `scope` may use."""

    async def permitted(request: Request) -> Caller:
        who, access = await _known_caller(request)
        if not covers(access.scopes, scope):
            raise Forbidden(public_key_id(access.tenant.key_id), scope, access.scopes)
        return who

    DECLARED[permitted] = scope
    return permitted


reads = wants(Scope.READ)
submits = wants(Scope.SUBMIT)
adapts = wants(Scope.ADAPTERS)
administers = wants(Scope.ADMIN)


async def anyone() -> None:
    """The dependency of an endpoint that tells nothing of tenants."""


DECLARED[anyone] = None
