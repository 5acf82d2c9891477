"""Paired statistics of two columns over the prompts that they share: for service, client and whoever scores at home.

Standard library alone. The bootstrap resamples prompts, so that several seeds of one prompt do not count as several
prompts; a resample of n prompts is a multinomial draw over the distinct differences, which costs the same for any n.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

NUM_RESAMPLES = 2_000
SEED = 0  # of the bootstrap, where the caller names none: the same data give the same interval


class DiffColumn(msgspec.Struct, frozen=True, kw_only=True):
    """`adapter` of one sweep against `with_adapter` of another, or of the same (None: the base).

    Over the prompts that both have answered and scored: accuracies (a prompt with several seeds counts once), their
    difference (`adapter` less `with_adapter`) with a 95 % paired bootstrap interval, prompts won, lost and tied, and
    McNemar's exact p over the pairs (prompt and seed). `p_adjusted` is p after Holm over all columns compared.
    """

    adapter: str | None
    with_adapter: str | None
    prompts: int
    pairs: int
    accuracy: float | None
    with_accuracy: float | None
    difference: float | None
    low: float | None
    high: float | None
    wins: int
    losses: int
    ties: int
    only_correct: int  # pairs that `adapter` alone has right
    only_with_correct: int  # and `with_adapter` alone
    p: float | None
    p_adjusted: float | None


class PromptPairs(msgspec.Struct, frozen=True):
    """One prompt's pairs: how many there are, and how many of them each side has right, and alone."""

    num: int
    correct: int
    with_correct: int
    only_correct: int
    only_with_correct: int


def compare(
    adapter: str | None,
    with_adapter: str | None,
    prompts: Sequence[PromptPairs],
    *,
    seed: int = SEED,
    num_resamples: int = NUM_RESAMPLES,
) -> DiffColumn:
    """The statistics of one comparison; None where there is no prompt to tell anything by."""
    num = len(prompts)
    differences = Counter(((p.correct - p.with_correct) / p.num) for p in prompts)
    only, only_with = sum(p.only_correct for p in prompts), sum(p.only_with_correct for p in prompts)
    low, high = bootstrap_mean(differences, seed=seed, num_resamples=num_resamples) if num else (None, None)
    p = mcnemar(only, only_with) if num else None
    return DiffColumn(
        adapter=adapter,
        with_adapter=with_adapter,
        prompts=num,
        pairs=sum(p.num for p in prompts),
        accuracy=_mean(p.correct / p.num for p in prompts),
        with_accuracy=_mean(p.with_correct / p.num for p in prompts),
        difference=math.fsum(d * n for d, n in differences.items()) / num if num else None,
        low=low,
        high=high,
        wins=sum(n for d, n in differences.items() if d > 0),
        losses=sum(n for d, n in differences.items() if d < 0),
        ties=differences[0.0],
        only_correct=only,
        only_with_correct=only_with,
        p=p,
        p_adjusted=p,
    )


def adjust(columns: Sequence[DiffColumn]) -> list[DiffColumn]:
    """`columns` with `p_adjusted` by Holm's step-down procedure (1979) over those that have a p."""
    tested = sorted((c.p, i) for i, c in enumerate(columns) if c.p is not None)
    adjusted: dict[int, float] = {}
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return [msgspec.structs.replace(c, p_adjusted=adjusted.get(i)) for i, c in enumerate(columns)]


def mcnemar(b: int, c: int) -> float:
    """McNemar's exact two-sided p for b and c discordant pairs: under no difference b is binomial(b + c, 1/2).

    Raises ValueError for a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"discordant pairs: got {b} and {c}, wanted counts")
    n, k = b + c, min(b, c)
    if b == c:
        return 1.0
    # Terms of the tail, from its largest down, in logarithms: n choose k outgrows a float at n of about 1,000.
    log_top = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    total, term = 1.0, 1.0
    for i in range(k, 0, -1):
        term *= i / (n - i + 1)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, 2 * math.exp(log_top + math.log(total)))


def bootstrap_mean(
    counts: Counter[float], *, seed: int = SEED, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values, given as value -> count, over bootstrap resamples.

    Raises ValueError where there is none.
    """
    n = counts.total()
    if n == 0:
        raise ValueError("values: got none, wanted at least one")
    rng = random.Random(seed)
    # The rarest first: the draws with the smallest means are the cheapest.
    values = sorted((count, value) for value, count in counts.items() if count)
    means = []
    for _ in range(num_resamples):
        left, left_weight, drawn = n, n, []
        for weight, value in values[:-1]:
            num = binomial(rng, left, weight / left_weight)
            drawn.append(num * value)
            left -= num
            left_weight -= weight
        drawn.append(left * values[-1][1])
        means.append(math.fsum(drawn) / n)
    means.sort()
    return _quantile(means, 0.025), _quantile(means, 0.975)


def binomial(rng: random.Random, n: int, p: float) -> int:
    """A draw from binomial(n, p): by inversion where n p is small, else Hoermann's BTRS (1993)."""
    if p > 0.5:
        return n - binomial(rng, n, 1 - p)
    if n == 0 or p <= 0.0:
        return 0
    if n * p < 10:
        # Geometric gaps between successes (Devroye 1986, X.4).
        log_q, x, gap = math.log1p(-p), -1, 0
        while True:
            gap += math.floor(math.log(1.0 - rng.random()) / log_q) + 1
            x += 1
            if gap > n:
                return x
    return _btrs(rng, n, p)


def _btrs(rng: random.Random, n: int, p: float) -> int:
    spread = math.sqrt(n * p * (1 - p))
    b = 1.15 + 2.53 * spread
    a = -0.0873 + 0.0248 * b + 0.01 * p
    c = n * p + 0.5
    v_r = 0.92 - 4.2 / b
    alpha = (2.83 + 5.1 / b) * spread
    log_odds = math.log(p / (1 - p))
    mode = math.floor((n + 1) * p)
    h = math.lgamma(mode + 1) + math.lgamma(n - mode + 1)
    while True:
        u = rng.random() - 0.5
        us = 0.5 - abs(u)
        k = math.floor((2 * a / us + b) * u + c) if us > 0 else -1
        if not 0 <= k <= n:
            continue
        v = rng.random()
        if us >= 0.07 and v <= v_r:
            return k
        v *= alpha / (a / (us * us) + b)
        if v <= 0 or math.log(v) <= h - math.lgamma(k + 1) - math.lgamma(n - k + 1) + (k - mode) * log_odds:
            return k


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else None


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
