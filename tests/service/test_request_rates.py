"""The rate of a tenant's requests: counted by shares, for all processes together, and without Redis by each alone."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from api_server import Api, stop_windows

from medley.api import rates
from medley.api.errors import RateLimited
from medley.api.rates import SHARES, WINDOW_S, RateLimiter
from medley.config import Limits, Quotas
from medley.db.tenants import Tenant
from medley.spec.ids import uuid7

LIMITS = Limits()
PER_S = 100.0
MOST = int(PER_S * WINDOW_S)
SHARE = MOST // SHARES


async def admitted(limiters: list[RateLimiter], tenant: Tenant, num: int) -> int:
    """How many of `num` requests are let in, which come one after another and to each limiter in turn."""
    count = 0
    for i in range(num):
        with contextlib.suppress(RateLimited):
            await limiters[i % len(limiters)].admit(tenant)
            count += 1
    return count


def new_tenant() -> Tenant:
    return Tenant(uuid7(), "rated", "mk_0", Quotas(requests_per_s=PER_S))


@pytest.mark.parametrize("num_processes", [1, 3])
def test_shares_let_in_what_the_limit_says(api: Api, num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "REDIS_TIMEOUT_S", 30.0)  # nobody counts alone because one answer came late
    monkeypatch.setattr(rates, "SHARE_S", 600.0)

    async def run() -> tuple[int, int]:
        limiters = [RateLimiter(api.settings.redis_url) for _ in range(num_processes)]
        tenant = new_tenant()
        counts = await admitted(limiters, tenant, MOST + 200), await admitted(limiters, new_tenant(), 10)
        for limiter in limiters:
            await limiter.close()
        return counts

    first, other = asyncio.run(run())
    # A process may hold what is left of a share, and while a window passes a part of the next one is there.
    assert MOST - num_processes * (SHARE - 1) <= first <= MOST + 50
    assert other == 10


def test_without_redis_a_process_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_windows(monkeypatch)

    async def run() -> int:
        limiter = RateLimiter("redis://127.0.0.1:1/0")
        return await admitted([limiter], new_tenant(), MOST + 50)

    assert asyncio.run(run()) == MOST
