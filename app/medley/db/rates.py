"""Rates: how many jobs end a second, read from one decaying count that costs the same on any batch.

A row keeps the ends by workers, each weighed by exp(-age / `WINDOW_S`), as of `recent_at`. After a gap of a whole
window the count begins anew, so that a pause or a wait for a worker does not look like slowness for a minute. The
first ends after a gap only start the clock: over no time there is no rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

WINDOW_S = 60.0
MIN_AGE_S = 1.0  # of a count before it is a rate


def recent_set(row: str, num: str) -> str:
    """SQL: the SET list that adds `num` ends, now, to the count of `row`."""
    now = "statement_timestamp()"
    is_gap = f"({row}.recent_at IS NULL OR {row}.recent_at < {now} - interval '{WINDOW_S:g} s')"
    age_s = f"greatest(0, extract(epoch FROM {now} - {row}.recent_at)::float8)"
    return (
        f"recent_num = CASE WHEN {num} = 0 THEN {row}.recent_num WHEN {is_gap} THEN 0"
        f" ELSE {row}.recent_num * exp(-{age_s} / {WINDOW_S:g}) + {num} END,"
        f" recent_since = CASE WHEN {num} > 0 AND {is_gap} THEN {now} ELSE {row}.recent_since END,"
        f" recent_at = CASE WHEN {num} > 0 THEN {now} ELSE {row}.recent_at END"
    )


@dataclass(frozen=True)
class Pace:
    """jobs a second, and seconds until the rest has ended at that rate; None where neither can be said."""

    rate: float | None
    eta_s: float | None


def pace(row: Row[Any]) -> Pace:
    """How fast the batch (or lane) of `row` goes. The row has its counts, `recent_*` and `read_at`."""
    num_left = row.total - row.succeeded - row.failed - row.cancelled - row.expired
    if num_left == 0:
        return Pace(None, 0.0)
    rate = _rate(row.recent_num, row.recent_at, row.recent_since, row.read_at)
    return Pace(rate, num_left / rate if rate else None)


def _rate(num: float, at: datetime | None, since: datetime | None, now: datetime) -> float | None:
    if at is None or since is None:
        return None
    age_s = (now - since).total_seconds()
    silent_s = max(0.0, (now - at).total_seconds())
    if silent_s > WINDOW_S:
        return 0.0
    if num == 0 or age_s < MIN_AGE_S:
        return None
    return num * math.exp(-silent_s / WINDOW_S) / (WINDOW_S * -math.expm1(-age_s / WINDOW_S))
