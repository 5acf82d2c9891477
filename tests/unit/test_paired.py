"""Paired statistics, judged by scipy."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from medley.spec.paired import PromptPairs, adjust, binomial, bootstrap_mean, compare, mcnemar


@pytest.mark.parametrize("b", [0, 1, 3, 17, 250, 4_000])
@pytest.mark.parametrize("c", [0, 1, 5, 19, 260, 4_200])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-7, abs=1e-300)


def test_mcnemar_wants_counts() -> None:
    with pytest.raises(ValueError, match="got -1 and 2"):
        mcnemar(-1, 2)


@pytest.mark.parametrize(("n", "p"), [(5, 0.5), (40, 0.1), (1_000, 0.004), (100, 0.4), (1_000, 0.3), (100_000, 0.62)])
def test_binomial_draws_are_binomial(n: int, p: float) -> None:
    rng = random.Random(1)
    draws = np.array([binomial(rng, n, p) for _ in range(20_000)])
    exact = scipy.stats.binom(n, p)
    edges = np.unique(exact.ppf([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]))
    bounds = np.concatenate([[-1], edges, [n]])
    expected = np.diff(exact.cdf(bounds)) * len(draws)
    counted = np.histogram(draws, bins=bounds + 0.5)[0]
    kept = expected > 5
    statistic = (((counted - expected) ** 2 / expected)[kept]).sum()
    assert scipy.stats.chi2.sf(statistic, kept.sum() - 1) > 1e-4


@pytest.mark.parametrize(
    "values",
    [
        [-1.0] * 30 + [0.0] * 800 + [1.0] * 90,
        [0.0] * 12 + [1.0] * 5 + [-1.0] * 3,
        [-0.75, 0.25, 0.5, 0.5, -0.25, 0.0, 1.0] * 30,
    ],
)
def test_the_interval_is_the_percentile_bootstraps(values: list[float]) -> None:
    low, high = bootstrap_mean(Counter(values), seed=3, num_resamples=20_000)
    judge = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4), batch=500
    ).confidence_interval
    spread = judge.high - judge.low
    assert low == pytest.approx(judge.low, abs=0.05 * spread)
    assert high == pytest.approx(judge.high, abs=0.05 * spread)
    assert bootstrap_mean(Counter(values), seed=3) == bootstrap_mean(Counter(values), seed=3)
    assert bootstrap_mean(Counter([0.5] * 9)) == (0.5, 0.5)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        bootstrap_mean(Counter())


def test_a_comparison_counts_prompts_and_pairs() -> None:
    prompts = [
        PromptPairs(2, 2, 1, 1, 0),  # won by half
        PromptPairs(2, 0, 2, 0, 2),  # lost
        PromptPairs(2, 1, 1, 1, 1),  # tied
        PromptPairs(2, 2, 2, 0, 0),  # tied
    ]
    column = compare("a", None, prompts)
    assert (column.prompts, column.pairs, column.wins, column.losses, column.ties) == (4, 8, 1, 1, 2)
    assert (column.accuracy, column.with_accuracy) == (0.625, 0.75)
    assert column.difference == pytest.approx(-0.125)
    assert column.low is not None
    assert column.high is not None
    assert column.low < -0.125 < column.high
    assert (column.only_correct, column.only_with_correct, column.p) == (2, 3, 1.0)
    empty = compare("a", "b", [])
    assert (empty.difference, empty.low, empty.p, empty.accuracy) == (None, None, None, None)


def test_holm_adjusts_over_all_that_were_tested() -> None:
    sides = [(9, 0), (3, 1), (8, 1), (0, 0), (2, 9)]
    columns = [
        compare("a", None, [PromptPairs(1, 1, 0, 1, 0)] * b + [PromptPairs(1, 0, 1, 0, 1)] * c) for b, c in sides
    ]
    adjusted = [column.p_adjusted for column in adjust(columns)]
    assert adjusted[3] is None
    tested = [0, 1, 2, 4]
    ps = [mcnemar(*sides[i]) for i in tested]
    order = sorted(range(4), key=lambda i: ps[i])
    highest, expected = 0.0, [0.0] * 4
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (4 - rank) * ps[i]))
        expected[i] = highest
    assert [adjusted[i] for i in tested] == pytest.approx(expected)
