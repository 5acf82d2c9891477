"""Rates from a decaying count: none before there is something to tell by, then near the true one."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from medley.db.rates import WINDOW_S, pace

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(**fields: Any) -> Any:
    counts = {"total": 100, "succeeded": 0, "failed": 0, "cancelled": 0, "expired": 0}
    recent = {"recent_num": 0.0, "recent_at": None, "recent_since": None, "read_at": NOW}
    return SimpleNamespace(**(counts | recent | fields))


def after(seconds: float, per_s: float, *, silent_s: float = 0.0) -> dict[str, Any]:
    """What the statements keep after `seconds` of ends each tenth of a second."""
    num = sum(per_s / 10 * math.exp(-(seconds - i / 10) / WINDOW_S) for i in range(1, round(seconds * 10) + 1))
    at = NOW - timedelta(seconds=silent_s)
    return {"recent_num": num, "recent_at": at, "recent_since": at - timedelta(seconds=seconds)}


@pytest.mark.parametrize("seconds", [2.0, 10.0, 60.0, 600.0])
@pytest.mark.parametrize("per_s", [0.5, 40.0])
def test_a_steady_rate_is_seen_soon_and_stays(seconds: float, per_s: float) -> None:
    going = pace(row(succeeded=60, **after(seconds, per_s)))
    assert going.rate == pytest.approx(per_s, rel=0.02)
    assert going.eta_s == pytest.approx(40 / per_s, rel=0.02)


def test_nothing_is_said_where_nothing_can_be() -> None:
    assert (pace(row()).rate, pace(row()).eta_s) == (None, None)
    first = row(recent_at=NOW, recent_since=NOW)
    assert (pace(first).rate, pace(first).eta_s) == (None, None)
    done = row(succeeded=99, failed=1, **after(10, 5))
    assert (pace(done).rate, pace(done).eta_s) == (None, 0.0)


def test_silence_slows_the_rate_and_a_long_one_ends_it() -> None:
    fresh, slower = pace(row(**after(60, 10))), pace(row(**after(60, 10, silent_s=20)))
    assert fresh.rate is not None
    assert slower.rate is not None
    assert slower.rate < fresh.rate
    stalled = pace(row(**after(60, 10, silent_s=WINDOW_S + 1)))
    assert (stalled.rate, stalled.eta_s) == (0.0, None)
