"""Keys are looked up once for all who ask at the same time, and again before they are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from medley.api import auth
from medley.api.auth import CACHE_S, Authenticator
from medley.api.errors import Unauthorized
from medley.config import Quotas
from medley.db.tenants import Access, Tenant
from medley.spec.scopes import Scope

KEY = "Bearer mk_key"
TENANT = UUID(int=1)


class Clock:
    """In place of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class SlowSql:
    """Answers each lookup when it is told to; counts them."""

    def __init__(self) -> None:
        self.answers: list[asyncio.Future[Access | None]] = []

    async def run_unbound(self, _act: Callable[[Any], Access | None]) -> Access | None:
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


def access(expires_in_s: float | None = None) -> Access:
    return Access(Tenant(TENANT, "acme", quotas=Quotas(), key_id="key_1"), frozenset({Scope.READ}), expires_in_s)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def learned(found: Access) -> tuple[Authenticator, SlowSql]:
    """An authenticator that has looked the key up for the first time."""
    sql = SlowSql()
    authenticator = Authenticator(sql, Quotas())  # type: ignore[arg-type]
    first = asyncio.create_task(authenticator.access(KEY))
    await settle()
    sql.answers[0].set_result(found)
    await first
    return authenticator, sql


@pytest.mark.usefixtures("clock")
def test_a_hundred_who_ask_at_once_cost_one_lookup() -> None:
    async def scenario() -> None:
        sql = SlowSql()
        authenticator = Authenticator(sql, Quotas())  # type: ignore[arg-type]
        asked = [asyncio.create_task(authenticator.access(KEY)) for _ in range(100)]
        await settle()
        asked[0].cancel()  # one who leaves does not take the answer along
        await settle()
        sql.answers[0].set_result(access())
        found = await asyncio.gather(*asked[1:])
        assert {one.tenant.id for one in found} == {TENANT}
        assert len(sql.answers) == 1

    asyncio.run(scenario())


def test_a_key_in_use_is_looked_up_again_beside_its_requests_and_forgotten_once_it_is_revoked(clock: Clock) -> None:
    async def scenario() -> None:
        authenticator, sql = await learned(access())
        clock.now += CACHE_S * 0.6
        for _ in range(3):
            await authenticator.access(KEY)  # nobody waits
        await settle()
        assert len(sql.answers) == 2
        sql.answers[1].set_exception(OSError("the database is away"))  # nobody's error: what is known still holds
        await settle()
        await authenticator.access(KEY)
        await settle()
        sql.answers[2].set_result(None)  # revoked meanwhile
        await settle()
        asked = asyncio.create_task(authenticator.access(KEY))
        await settle()
        sql.answers[3].set_result(None)
        with pytest.raises(Unauthorized):
            await asked

    asyncio.run(scenario())


def test_a_key_that_is_about_to_expire_is_not_remembered_for_longer(clock: Clock) -> None:
    async def scenario() -> None:
        authenticator, sql = await learned(access(expires_in_s=1.0))
        clock.now += 1.0
        late = asyncio.create_task(authenticator.access(KEY))
        await settle()
        sql.answers[1].set_result(None)
        with pytest.raises(Unauthorized):
            await late

    asyncio.run(scenario())


@pytest.mark.usefixtures("clock")
def test_what_was_asked_before_a_tenants_keys_changed_is_not_remembered() -> None:
    async def scenario() -> None:
        sql = SlowSql()
        authenticator = Authenticator(sql, Quotas())  # type: ignore[arg-type]
        before = asyncio.create_task(authenticator.access(KEY))
        await settle()
        authenticator.forget(TENANT)
        after = asyncio.create_task(authenticator.access(KEY))
        await settle()
        sql.answers[0].set_result(access())
        await before
        assert len(sql.answers) == 2
        sql.answers[1].set_result(None)
        with pytest.raises(Unauthorized):
            await after
        assert authenticator._known == {}

    asyncio.run(scenario())
