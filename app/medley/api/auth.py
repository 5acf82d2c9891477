"""Who calls, and whether he may: the tenant behind a bearer key, remembered for a few seconds, and the key's scopes.

Every endpoint takes one of the dependencies `reads`, `submits`, `adapts`, `administers` or `anyone`, which declare
what it wants. A revoked key works for `CACHE_S` seconds more at the most. Keys are remembered by their hash alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
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


class _Known(NamedTuple):
    """What a key opens; stale_at: from when on it is looked up again beside requests, ends_at: before them."""

    access: Access
    stale_at: float
    ends_at: float


class Authenticator:
    """Looks keys up, each at the most twice in `CACHE_S` seconds and never twice at once. Lives in one event loop.

    A key in use is looked up again before it is forgotten, so that no request waits for that: hundreds at once would.
    `quotas`: of tenants without limits of their own.
    """

    def __init__(self, sql: Sql, quotas: Quotas) -> None:
        self._sql = sql
        self._quotas = quotas
        self._known: dict[bytes, _Known] = {}
        self._asked: dict[bytes, asyncio.Task[Access]] = {}
        self._num_forgotten = 0  # what was asked before the last time is not remembered

    async def access(self, authorization: str | None) -> Access:
        """What an Authorization header opens. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_LEN:
            raise Unauthorized
        digest = hashlib.sha256(key.encode()).digest()
        known, now = self._known.get(digest), time.monotonic()
        if known is None or known.ends_at <= now:
            # Others may wait for the same answer: one who leaves does not take it along.
            return await asyncio.shield(self._ask(digest, key))
        if known.stale_at <= now:
            self._ask(digest, key)
        return known.access

    def forget(self, tenant: UUID) -> None:
        """Looks the tenant's keys up anew, in this process."""
        self._known = {digest: known for digest, known in self._known.items() if known.access.tenant.id != tenant}
        self._asked.clear()
        self._num_forgotten += 1

    def _ask(self, digest: bytes, key: str) -> asyncio.Task[Access]:
        asked = self._asked.get(digest)
        if asked is None:
            asked = self._asked[digest] = asyncio.create_task(self._look_up(digest, key))
            asked.add_done_callback(partial(self._answered, digest))
        return asked

    async def _look_up(self, digest: bytes, key: str) -> Access:
        asked_at, num_forgotten = time.monotonic(), self._num_forgotten
        access = await self._sql.run_unbound(lambda conn: authenticate(conn, key, self._quotas))
        if access is None:
            self._known.pop(digest, None)
            raise Unauthorized
        if num_forgotten == self._num_forgotten:
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            left_s = CACHE_S if access.expires_in_s is None else min(CACHE_S, access.expires_in_s)
            self._known[digest] = _Known(access, asked_at + left_s / 2, asked_at + left_s)
        return access

    def _answered(self, digest: bytes, asked: asyncio.Task[Access]) -> None:
        if self._asked.get(digest) is asked:
            del self._asked[digest]
        if not asked.cancelled():
            asked.exception()  # an error is the askers'; where nobody waits, the next one asks again


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
