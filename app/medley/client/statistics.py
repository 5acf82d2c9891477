"""Exact-match accuracy per adapter with its interval, the base beside it, from counts alone.

Owns the arithmetic for notebooks and for results scored at home; knows nothing of HTTP, sweeps or prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the standard normal's 97.5 % point: two sides, 95 % between them


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


@dataclass(frozen=True)
class AdapterScore:
    """How one adapter did. `low`, `high`: the 95 % interval of `accuracy`, which is None where no job ran.

    The base's figures are over the same `num_jobs` prompts, and None where the base was not run.
    """

    adapter: str
    num_jobs: int
    num_correct: int
    accuracy: float | None
    low: float
    high: float
    base_num_correct: int | None
    base_accuracy: float | None


def score_adapter(adapter: str, num_jobs: int, num_correct: int, base_num_correct: int | None = None) -> AdapterScore:
    """The score from counts. Raises ValueError where a count is not within 0 and `num_jobs`."""
    if base_num_correct is not None and not 0 <= base_num_correct <= num_jobs:
        raise ValueError(f"base_num_correct: got {base_num_correct} of {num_jobs}, wanted 0 to {num_jobs}")
    low, high = wilson(num_correct, num_jobs)
    return AdapterScore(
        adapter=adapter,
        num_jobs=num_jobs,
        num_correct=num_correct,
        accuracy=num_correct / num_jobs if num_jobs else None,
        low=low,
        high=high,
        base_num_correct=base_num_correct,
        base_accuracy=None if base_num_correct is None or not num_jobs else base_num_correct / num_jobs,
    )
