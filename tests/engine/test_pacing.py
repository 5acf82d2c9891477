"""The bound on the time per output token, held on synthetic step times."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from medley_worker import Engine, Request, SamplingParams
from medley_worker.engine.pacing import FIRST_PROMPT_TOKENS, FIRST_ROWS, MIN_PROMPT_TOKENS, Pace

NUM_ROWS = 256


def decode(pace: Pace, num_steps: int, seconds: Callable[[int], float], rows: int | None = None) -> None:
    """Steps of decode rows alone: as many rows as the pace allows, or fewer."""
    for _ in range(num_steps):
        num_rows = pace.max_rows if rows is None else min(rows, pace.max_rows)
        pace.observe(num_rows, 0, seconds(num_rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound_ms", [6.0, 12.0, 30.0])
def test_rows_settle_just_within_the_bound(seed: int, bound_ms: float) -> None:
    rng = random.Random(seed)
    base_ms, row_ms = rng.uniform(2, 4), rng.uniform(0.05, 0.3)

    def seconds(num_rows: int) -> float:
        noise = 20.0 if rng.random() < 0.05 else rng.uniform(0, 0.02)
        return (base_ms + row_ms * num_rows) / 1000 * (1 + noise)

    pace = Pace(bound_ms, NUM_ROWS)
    decode(pace, 400, seconds)
    best = min(NUM_ROWS, (bound_ms - base_ms) / row_ms)
    for _ in range(100):
        decode(pace, 5, seconds)
        assert (base_ms + row_ms * pace.max_rows) <= 1.05 * bound_ms or pace.max_rows == 1
    assert pace.max_rows >= min(best, 0.8 * best + 1) - 1 or base_ms + row_ms * (pace.max_rows + 1) > 0.85 * bound_ms


def test_it_starts_low_grows_fast_and_never_past_the_first_step_that_is_too_slow() -> None:
    pace = Pace(10.0, NUM_ROWS)
    assert pace.max_rows == FIRST_ROWS
    most = 0
    for _ in range(60):
        decode(pace, 1, lambda n: 0.002 + 0.00005 * n)
        most = max(most, pace.max_rows)
    assert 140 <= pace.max_rows <= most <= 160


def test_rows_never_fall_below_one() -> None:
    pace = Pace(1.0, NUM_ROWS)
    decode(pace, 500, lambda _: 0.1)
    assert pace.max_rows == 1
    assert pace.prompt_tokens == MIN_PROMPT_TOKENS


def test_few_rows_say_nothing_about_many() -> None:
    pace = Pace(10.0, NUM_ROWS)
    decode(pace, 500, lambda _: 0.003, rows=4)
    assert pace.max_rows == FIRST_ROWS


def test_rows_from_before_a_cut_do_not_cut_again() -> None:
    pace = Pace(10.0, NUM_ROWS)
    decode(pace, 200, lambda n: 0.0001 * n)
    before = pace.max_rows
    decode(pace, 5, lambda _: 0.011)
    cut = pace.max_rows
    assert 0.85 * before < cut < before
    for _ in range(100):
        pace.observe(before, 0, 0.011)
    assert pace.max_rows == cut


def test_longer_texts_shrink_it_and_shorter_ones_let_it_grow_again() -> None:
    pace = Pace(10.0, NUM_ROWS)
    decode(pace, 300, lambda n: 0.0001 * n)
    short = pace.max_rows
    decode(pace, 300, lambda n: 0.0002 * n)
    long = pace.max_rows
    decode(pace, 2000, lambda n: 0.0001 * n)
    assert 85 <= short <= 100
    assert 42 <= long <= 50
    assert pace.max_rows >= 85


def test_a_prompts_chunk_takes_what_the_bound_leaves() -> None:
    pace = Pace(10.0, 32)
    assert pace.prompt_tokens == MIN_PROMPT_TOKENS
    decode(pace, 100, lambda _: 0.006)
    assert pace.prompt_tokens == FIRST_PROMPT_TOKENS
    for _ in range(20):
        pace.observe(32, pace.prompt_tokens, 0.006 + 0.00002 * pace.prompt_tokens)
    assert 0.0096 <= 0.006 + 0.00002 * pace.prompt_tokens <= 0.0101


def test_prompts_alone_are_not_held_back_and_teach_nothing() -> None:
    pace = Pace(10.0, 32)
    pace.observe(0, 2048, 5.0)
    assert (pace.max_rows, pace.prompt_tokens) == (FIRST_ROWS, MIN_PROMPT_TOKENS)


def test_an_engine_held_to_an_impossible_bound_still_answers_one_row_at_a_time(tiny_model: Path) -> None:
    requests = [Request(tiny.prompt(40, i), None, SamplingParams(max_tokens=12, ignore_eos=True)) for i in range(20)]
    plain = Engine.load(tiny_model, max_num_seqs=16, max_model_len=64)
    held = Engine.load(tiny_model, max_num_seqs=16, max_model_len=64, max_tpot_ms=1e-3)
    assert held.generate(requests) == plain.generate(requests)
    for i, request in enumerate(requests):
        held.add_request(i, request)
    most = 0
    while held.has_work:
        held.step()
        held.check_integrity()
        most = max(most, held.stats().num_running)
    assert most == 1
    for engine in (plain, held):
        engine.close()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_no_time_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="max_tpot_ms"):
        Pace(bound, 8)
