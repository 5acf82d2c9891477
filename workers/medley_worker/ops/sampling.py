"""Drawing the next token of each row: one formula for CPU and GPU, whose noise does not depend on the row.

Order: logit_bias, penalties, masked ids and grammars' masks; temperature; top-k, top-p, min-p; argmax(logit + Gumbel
noise). The noise of a token is a hash of (seed, position, token id) and of nothing else, so a draw is the same in any
batch, at any place, and after a preemption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley.spec.sampling import SamplingParams

# SplitMix64's constants (Steele, Lea, Flood 2014), as signed 64-bit numbers where they exceed 2^63.
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
# A temperature above 0 that float32 would round to 0 draws as the smallest one it holds.
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row's draw depends on.

    position: the place in its sequence of the token to be drawn (prompt tokens + generated so far). token ids:
    prompt and output so far, read by penalties alone. masked_token_ids: can not be drawn (end tokens before
    min_tokens). allowed: [ceil(V / 32)] int32, bit i of word w: whether token 32 w + i can be drawn; None: all can.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    masked_token_ids: Sequence[int] = ()
    allowed: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Edits:
    """Single logits to change, in coordinate form."""

    rows: Tensor  # [n] int64 into the processed rows
    token_ids: Tensor  # [n] int64
    values: Tensor  # [n] float32, to add; -inf masks


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """Tokens with a penalty, in coordinate form: (row, token) once each."""

    rows: Tensor  # [n] int64 into the processed rows
    token_ids: Tensor  # [n] int64
    repetition: Tensor  # [n] float32: factor for tokens of prompt or output
    subtract: Tensor  # [n] float32: presence + frequency x occurrences in the output


@dataclass(frozen=True, slots=True)
class Masks:
    """What may be drawn in rows that a grammar guides."""

    rows: Tensor  # [n] int64 into the processed rows
    allowed: Tensor  # [n, ceil(V / 32)] int32, see SamplingRow.allowed


@dataclass(frozen=True, slots=True)
class Filters:
    """Per processed row; a row that does not use a filter holds the value that keeps everything."""

    top_k: Tensor  # [n] int64
    top_p: Tensor  # [n] float32
    min_p: Tensor  # [n] float32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The rows that need more than an argmax; the rest are plain greedy. None: no row needs that part."""

    num_rows: int
    rows: Tensor | None = None  # [n] int64 of the logits' rows, ascending
    edits: Edits | None = None
    seen: SeenTokens | None = None
    masks: Masks | None = None
    temperature: Tensor | None = None  # [n, 1] float32; 1 for greedy rows among the processed
    noise_keys: Tensor | None = None  # [n, 1] int64
    is_random: Tensor | None = None  # [n, 1] bool
    filters: Filters | None = None


class Sampled(NamedTuple):
    """token_ids: [B] int64. logprobs: [B] float32. is_nan: [B] bool, the row's logits are not finite numbers."""

    token_ids: Tensor
    logprobs: Tensor
    is_nan: Tensor


def build_sampling_batch(
    rows: Sequence[SamplingRow | None], vocab_size: int, device: torch.device | str = "cpu"
) -> SamplingBatch:
    """A SamplingBatch from one entry a logits row (None: plain greedy)."""
    indices = [i for i, row in enumerate(rows) if row is not None]
    if not indices:
        return SamplingBatch(num_rows=len(rows))
    used = [row for row in rows if row is not None]
    temperatures = [row.params.temperature for row in used]
    is_random = any(temperature > 0 for temperature in temperatures)
    keys = [noise_key(row.seed, row.position) for row in used]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return _upload(torch.tensor(values, dtype=dtype), device).unsqueeze(1)

    return SamplingBatch(
        num_rows=len(rows),
        rows=_upload(torch.tensor(indices), device),
        edits=_edits(used, vocab_size, device),
        seen=_seen_tokens(used, vocab_size, device),
        masks=_masks(used, device),
        temperature=column([max(t, MIN_TEMPERATURE) if t > 0 else 1.0 for t in temperatures], torch.float32)
        if is_random
        else None,
        noise_keys=column(keys, torch.int64) if is_random else None,
        is_random=column([t > 0 for t in temperatures], torch.bool) if is_random else None,
        filters=_filters(used, vocab_size, device),
    )


def _upload(values: Tensor, device: torch.device | str) -> Tensor:
    """On `device`; to CUDA from pinned memory, which torch keeps until the copy is done, so that nothing waits."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values


def _edits(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> Edits | None:
    found = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.params.logit_bias.items()
        if token < vocab_size
    ]
    found += [(i, token, -math.inf) for i, row in enumerate(rows) for token in row.masked_token_ids]
    if not found:
        return None
    at, token_ids, values = zip(*found, strict=True)
    return Edits(
        _upload(torch.tensor(at), device),
        _upload(torch.tensor(token_ids), device),
        _upload(torch.tensor(values, dtype=torch.float32), device),
    )


def _seen_tokens(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> SeenTokens | None:
    parts: list[tuple[np.ndarray, ...]] = []
    for i, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty:
            continue
        output = np.bincount(np.asarray(row.output_token_ids, dtype=np.int64), minlength=vocab_size)
        prompt = np.bincount(np.asarray(row.prompt_token_ids, dtype=np.int64), minlength=vocab_size)
        tokens = np.flatnonzero(output + prompt)
        subtract = params.presence_penalty * (output[tokens] > 0) + params.frequency_penalty * output[tokens]
        repetition = np.full(len(tokens), params.repetition_penalty)
        parts.append((np.full(len(tokens), i), tokens, repetition, subtract))
    if not parts:
        return None
    at, tokens, repetition, subtract = (np.concatenate(part) for part in zip(*parts, strict=True))
    return SeenTokens(
        _upload(torch.as_tensor(at), device),
        _upload(torch.as_tensor(tokens), device),
        _upload(torch.as_tensor(repetition, dtype=torch.float32), device),
        _upload(torch.as_tensor(subtract, dtype=torch.float32), device),
    )


def _masks(rows: list[SamplingRow], device: torch.device | str) -> Masks | None:
    guided = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if not guided:
        return None
    at, allowed = zip(*guided, strict=True)
    return Masks(_upload(torch.tensor(at), device), _upload(torch.from_numpy(np.stack(allowed)), device))


def _filters(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> Filters | None:
    params = [row.params for row in rows]
    # Greedy rows take the best token, which every filter keeps.
    if not any(p.temperature > 0 and (p.top_k is not None or p.top_p < 1 or p.min_p > 0) for p in params):
        return None
    top_k = [vocab_size if p.top_k is None else min(p.top_k, vocab_size) for p in params]
    return Filters(
        _upload(torch.tensor(top_k), device),
        _upload(torch.tensor([p.top_p for p in params], dtype=torch.float32), device),
        _upload(torch.tensor([p.min_p for p in params], dtype=torch.float32), device),
    )


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """One token a row. logits: [B, V] float32, not mutated.

    A token's logprob is its log-softmax in the raw logits, before any processing. A row whose logits hold NaN or
    +inf is reported in `is_nan`; its token and logprob mean nothing.
    """
    assert len(logits) == batch.num_rows
    token_ids = logits.argmax(-1)
    if batch.rows is not None:
        processed = _process(logits.index_select(0, batch.rows), batch)
        token_ids.index_copy_(0, batch.rows, processed.argmax(-1))
    total = logits.logsumexp(-1)
    logprobs = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - total
    return Sampled(token_ids, logprobs, ~total.isfinite())


def _process(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Scores whose argmax is the draw. logits: [n, V], a copy that is mutated."""
    if batch.edits is not None:
        edits = batch.edits
        logits.index_put_((edits.rows, edits.token_ids), edits.values, accumulate=True)
    if batch.seen is not None:
        seen = batch.seen
        values = logits[seen.rows, seen.token_ids]
        values = torch.where(values > 0, values / seen.repetition, values * seen.repetition)
        logits[seen.rows, seen.token_ids] = values - seen.subtract
    if batch.masks is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = (batch.masks.allowed.unsqueeze(-1) >> bits) & 1  # [n, words, 32]
        is_banned = is_allowed.flatten(1)[:, : logits.shape[1]] == 0
        rows = batch.masks.rows
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill(is_banned, -math.inf))
    if batch.temperature is None or batch.noise_keys is None or batch.is_random is None:
        return logits
    # The best token at 0: at a tiny temperature the others go to -inf, and none to +inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / batch.temperature
    if batch.filters is not None:
        logits = _filter(logits, batch.filters)
    return torch.where(batch.is_random, logits + gumbel_noise(batch.noise_keys, logits.shape[1]), logits)


def _filter(logits: Tensor, filters: Filters) -> Tensor:
    """-inf for every token that top-k, top-p or min-p drops. Among equal logits the lower id counts as better."""
    best_first, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = best_first.softmax(-1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    # Top-p sees what top-k left, so the mass before a token is counted among those.
    kept = torch.where(rank < filters.top_k.unsqueeze(1), probabilities, 0)
    kept = kept / kept.sum(-1, keepdim=True)
    mass_before = kept.cumsum(-1) - kept
    is_kept = (rank < filters.top_k.unsqueeze(1)) & (
        (mass_before < filters.top_p.unsqueeze(1)) | (filters.top_p.unsqueeze(1) >= 1)
    )
    is_kept &= probabilities >= filters.min_p.unsqueeze(1) * probabilities[:, :1]
    is_kept[:, 0] = True
    best_first = best_first.masked_fill(~is_kept, -math.inf)
    return torch.empty_like(logits).scatter_(1, order, best_first)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """SplitMix64's finalizer on Python ints of 64 bits."""
    value = ((value ^ (value >> 30)) * MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * MIX_2) & _MASK
    return value ^ (value >> 31)


def noise_key(seed: int, position: int) -> int:
    """The key of one draw, as a signed 64-bit number: mix(mix(seed + GOLDEN) + (position + 1) GOLDEN)."""
    return _signed(_mix((_mix((seed + GOLDEN) & _MASK) + (position + 1) * GOLDEN) & _MASK))


def hash_tokens(keys: Tensor, vocab_size: int) -> Tensor:
    """[n, V] int64: 32 hashed bits a token, of mix(key + (token + 1) GOLDEN). keys: [n, 1] int64.

    int64 arithmetic wraps; `_shift` makes the right shifts logical.
    """
    counters = torch.arange(1, vocab_size + 1, device=keys.device) * _signed(GOLDEN)
    value = keys + counters
    value = (value ^ _shift(value, 30)) * _signed(MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(MIX_2)
    return _shift(value ^ _shift(value, 31), 32)


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """[n, V] float32 standard Gumbel: -log(-log(u)), u = (hash + 0.5) / 2^32. keys: [n, 1] int64.

    In float64 up to the last rounding, so that a library's last bit of `log` does not reach the result.
    """
    uniform = (hash_tokens(keys, vocab_size).to(torch.float64) + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
