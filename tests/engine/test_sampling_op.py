"""Sampling: each parameter's effect, and draws that depend on (seed, position, token id) alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from medley.spec.sampling import SamplingParams
from medley_worker.ops.sampling import (
    SamplingRow,
    build_sampling_batch,
    gumbel_noise,
    hash_tokens,
    noise_key,
    sample,
)

V = 50


def row(seed: int = 0, position: int = 3, output: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    masked = params.pop("masked", ())
    return SamplingRow(SamplingParams(**params), seed, position, (1, 2), output, masked)


def logits_of(*values: float, others: float = -20.0) -> torch.Tensor:
    logits = torch.full((1, V), others)
    logits[0, : len(values)] = torch.tensor(values)
    return logits


def draws(logits: torch.Tensor, num: int = 2000, **params: Any) -> torch.Tensor:
    """How often each token is drawn, over `num` positions."""
    rows = [row(position=i, **params) for i in range(num)]
    tokens = sample(logits.expand(num, -1), build_sampling_batch(rows, V)).token_ids
    return torch.bincount(tokens, minlength=V) / num


def test_a_plain_row_takes_the_best_token_and_its_raw_logprob() -> None:
    logits = torch.randn(7, V, generator=torch.Generator().manual_seed(0))
    result = sample(logits, build_sampling_batch([None] * 7, V))
    assert torch.equal(result.token_ids, logits.argmax(-1))
    wanted = logits.log_softmax(-1).gather(1, result.token_ids[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs, wanted)
    assert not result.is_nan.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_bad_logits_is_reported_and_harms_no_other(bad: float) -> None:
    logits = torch.randn(3, V)
    logits[1, 4] = bad
    rows = [row(temperature=1.0, top_p=0.9, seed=i) for i in range(3)]
    result = sample(logits, build_sampling_batch(rows, V))
    assert result.is_nan.tolist() == [False, True, False]
    alone = sample(logits[2:], build_sampling_batch(rows[2:], V))
    assert result.token_ids[2] == alone.token_ids[0]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = logits_of(1.0, 0.0, -1.0)
    for temperature in (0.5, 1.0, 2.0):
        got = draws(logits, temperature=temperature, num=8000)[:3]
        wanted = (logits[0] / temperature).softmax(-1)[:3]
        assert (got - wanted).abs().max() < 0.02


def test_a_draw_is_the_same_in_any_batch_and_place() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, V, generator=generator)
    params = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.3}
    for seed in range(20):
        mine = row(seed=seed, position=seed + 1, output=(3, 4, 4), **params)
        alone = sample(logits, build_sampling_batch([mine], V))
        for place, size in ((0, 3), (5, 17), (63, 64)):
            others = torch.randn(size, V, generator=generator)
            others[place] = logits[0]
            rows: list[SamplingRow | None] = [
                None if i % 3 == 0 else row(seed=i, position=i, temperature=1.0, top_p=0.5) for i in range(size)
            ]
            rows[place] = mine
            among = sample(others, build_sampling_batch(rows, V))
            assert among.token_ids[place] == alone.token_ids[0]
            assert among.logprobs[place] == alone.logprobs[0]


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    logits = logits_of(*torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist(), others=-1e9)
    assert draws(logits, temperature=1.0, top_k=2)[2:].sum() == 0
    assert draws(logits, temperature=1.0, top_p=0.75).nonzero().flatten().tolist() == [0, 1]
    assert draws(logits, temperature=1.0, top_p=0.85).nonzero().flatten().tolist() == [0, 1, 2]
    assert draws(logits, temperature=1.0, min_p=0.4).nonzero().flatten().tolist() == [0, 1]
    assert draws(logits, temperature=1.0, top_p=1e-6).nonzero().flatten().tolist() == [0]
    # Top-p counts the mass that top-k left: 0.5 is less than 0.6, but 0.5 of 0.8 is more.
    assert draws(logits, temperature=1.0, top_p=0.6).nonzero().flatten().tolist() == [0, 1]
    assert draws(logits, temperature=1.0, top_k=2, top_p=0.6).nonzero().flatten().tolist() == [0]


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert draws(torch.zeros(1, V), temperature=1.0, top_k=3).nonzero().flatten().tolist() == [0, 1, 2]


def test_penalties_and_biases_move_greedy_choices() -> None:
    def best(logits: torch.Tensor, **params: Any) -> int:
        return int(sample(logits, build_sampling_batch([row(**params)], V)).token_ids[0])

    # Token 1 is in the prompt, token 5 in the output twice.
    logits = logits_of(0.0, 2.0, 0.0, 1.9, 0.0, 2.5)
    assert best(logits, output=(5, 5)) == 5
    assert best(logits, output=(5, 5), repetition_penalty=1.5) == 3
    assert best(logits, output=(5, 5), presence_penalty=0.55) == 1
    assert best(logits, output=(5, 5), frequency_penalty=0.26) == 1
    assert best(logits, logit_bias={7: 30.0}) == 7
    assert best(logits, masked=(5, 1)) == 3
    negative = logits_of(-1.0, -0.9, others=-2.0)
    assert best(negative, repetition_penalty=2.0) == 0


def test_the_logprob_is_that_of_the_raw_logits_whatever_the_processing() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    processed = row(temperature=0.7, top_k=5, logit_bias={3: 5.0}, repetition_penalty=1.2)
    result = sample(logits, build_sampling_batch([processed], V))
    torch.testing.assert_close(result.logprobs[0], logits.log_softmax(-1)[0, result.token_ids[0]])


def test_noise_is_the_documented_hash() -> None:
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    for seed, position in ((0, 0), (2**63 - 1, 7), (12345, 40_000)):
        key = noise_key(seed, position)
        got = hash_tokens(torch.tensor([[key]]), V)[0].tolist()
        assert got == [mix((key + (token + 1) * 0x9E3779B97F4A7C15) & mask) >> 32 for token in range(V)]


def test_noise_is_gumbel_distributed() -> None:
    keys = torch.tensor([[noise_key(seed, position)] for seed in range(20) for position in range(20)])
    noise = gumbel_noise(keys, 500).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.04


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-39, 1e-300])
def test_a_temperature_near_zero_takes_the_best_token(temperature: float) -> None:
    logits = logits_of(3.0, 11.0, 10.5)
    assert draws(logits, 50, temperature=temperature)[1] == 1
    assert draws(logits, 50, temperature=temperature, top_p=0.9, top_k=2)[1] == 1


def test_a_mask_lets_only_its_tokens_be_drawn_whatever_else_is_asked_for() -> None:
    vocab_size = 70  # no multiple of 32
    generator = np.random.default_rng(0)
    allowed = generator.random((40, vocab_size)) < 0.1
    allowed[:, 69] = True
    words = np.zeros((40, 3), np.int32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        words[row, token // 32] |= np.int32(np.uint32(1) << np.uint32(token % 32))
    logits = torch.randn((40, vocab_size), generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 2.0, "logit_bias": {3: 100.0}},
    ]
    rows = [
        SamplingRow(SamplingParams(**kinds[i % 4]), i, 3, (1, 2), (4,), allowed=None if i % 5 == 0 else words[i])
        for i in range(40)
    ]
    drawn = sample(logits, build_sampling_batch(rows, vocab_size))
    for i, token in enumerate(drawn.token_ids.tolist()):
        if i % 5:
            assert allowed[i, token], i
        if i % 20 == 4:
            assert token == logits[i].masked_fill(~torch.from_numpy(allowed[i]), -torch.inf).argmax()
    free = [row if row.allowed is None else None for row in rows]
    unmasked = sample(logits, build_sampling_batch(free, vocab_size)).token_ids
    assert torch.equal(drawn.token_ids[::5], unmasked[::5])
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).gather(1, drawn.token_ids[:, None])[:, 0])
