"""A column of a sweep's report, and the interval of a share: for service, client and whoever scores results at home."""

from __future__ import annotations

import math

import msgspec

Z_95 = 1.959963984540054  # the standard normal's 97.5 % point: two sides, 95 % between them


class ReportColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of a sweep (None: the base): exact matches over scored prompts, with a 95 % Wilson interval.

    The base's figures beside an adapter are over that adapter's own prompts.
    """

    adapter: str | None
    ended: int
    succeeded: int
    unsuccessful: int
    scored: int
    correct: int
    accuracy: float | None
    low: float | None
    high: float | None
    base_scored: int
    base_correct: int
    base_accuracy: float | None
    completion_tokens: int


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval (low, high) of a share, Wilson 1927; (0, 1) of nothing, which says nothing.

    Unlike p +- z * sqrt(p (1 - p) / n) it stays within 0 and 1 and has a width at 0 and at n successes.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: got {successes} of {n}, wanted 0 to {n}")
    if n == 0:
        return 0.0, 1.0
    share, z_squared = successes / n, Z_95 * Z_95
    centre = (share + z_squared / (2 * n)) / (1 + z_squared / n)
    half_width = Z_95 / (1 + z_squared / n) * math.sqrt(share * (1 - share) / n + z_squared / (4 * n * n))
    # The ends are exact where rounding would leave them a hair off.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == n else centre + half_width
    return low, high
