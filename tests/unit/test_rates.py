"""Rates from a decaying count: none before there is something to tell by, then near the true one."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from medley.db.rates import WINDOW_S, end_at_rate, read_rate

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(**fields: Any) -> Any:
    return SimpleNamespace(**({"recent_num": 0.0, "recent_at": None, "recent_since": None, "read_at": NOW} | fields))


def after(seconds: float, per_s: float, *, silent_s: float = 0.0) -> dict[str, Any]:
    """What the statements keep after `seconds` of ends each tenth of a second."""
    num = sum(per_s / 10 * math.exp(-(seconds - i / 10) / WINDOW_S) for i in range(1, round(seconds * 10) + 1))
    at = NOW - timedelta(seconds=silent_s)
    return {"recent_num": num, "recent_at": at, "recent_since": at - timedelta(seconds=seconds)}


@pytest.mark.parametrize("seconds", [2.0, 10.0, 60.0, 600.0])
@pytest.mark.parametrize("per_s", [0.5, 40.0])
def test_a_steady_rate_is_seen_soon_and_stays(seconds: float, per_s: float) -> None:
    going = row(**after(seconds, per_s))
    assert read_rate(going) == pytest.approx(per_s, rel=0.02)
    end = end_at_rate(going, 40)
    assert end is not None
    assert (end - NOW).total_seconds() == pytest.approx(40 / per_s, rel=0.02)


def test_nothing_is_said_where_nothing_can_be() -> None:
    for unknown in (row(), row(recent_at=NOW, recent_since=NOW)):
        assert (read_rate(unknown), end_at_rate(unknown, 40)) == (None, None)
    assert end_at_rate(row(**after(10, 5)), 0) is None


def test_silence_slows_the_rate_and_a_long_one_ends_it() -> None:
    fresh, slower = read_rate(row(**after(60, 10))), read_rate(row(**after(60, 10, silent_s=20)))
    assert fresh is not None
    assert slower is not None
    assert slower < fresh
    stalled = row(**after(60, 10, silent_s=WINDOW_S + 1))
    assert (read_rate(stalled), end_at_rate(stalled, 40)) == (0.0, None)
