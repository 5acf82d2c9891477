"""Rates: how many jobs end a second, read from one decaying count that costs the same on any batch.

A row keeps the ends by workers, each weighed by exp(-age / `WINDOW_S`), as of `recent_at`. After a gap of a whole
window the count begins anew, so that a pause or a wait for a worker does not look like slowness for a minute. The
first ends after a gap only start the clock: over no time there is no rate.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

WINDOW_S = 60.0
MIN_AGE_S = 1.0  # of a count before it is a rate
MAX_END_S = 366 * 86_400.0  # beyond it nothing is known: the rate is next to nothing


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


def read_rate(row: Row[Any]) -> float | None:
    """Jobs a second of the batch (or lane) of `row`, which has `recent_*` and `read_at`; None where nobody can say."""
    if row.recent_at is None or row.recent_since is None:
        return None
    age_s = (row.read_at - row.recent_since).total_seconds()
    silent_s = max(0.0, (row.read_at - row.recent_at).total_seconds())
    if silent_s > WINDOW_S:
        return 0.0
    if row.recent_num == 0 or age_s < MIN_AGE_S:
        return None
    num: float = row.recent_num
    return num * math.exp(-silent_s / WINDOW_S) / (WINDOW_S * -math.expm1(-age_s / WINDOW_S))


def end_at_rate(row: Row[Any], num_left: int) -> datetime | None:
    """When `num_left` jobs will have ended at the present rate; None where there is none, or nothing is left."""
    rate = read_rate(row)
    if not rate or num_left == 0 or num_left / rate > MAX_END_S:
        return None
    at: datetime = row.read_at + timedelta(seconds=num_left / rate)
    return at
