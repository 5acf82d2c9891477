"""Log-probabilities of given tokens and of the likeliest ones, row by row, in the model's own distribution.

One formula for CPU and GPU. A row's result depends on its own logits alone; of equal logits the lower id is better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Bytes that a logit takes while it is scored: the model's dtype, float32, and int64 keys with what they are made of.
LOGIT_BYTES = 48
SCORE_BYTES = 1 << 27  # rows scored at a time take at most so much
MIN_SCORE_ROWS = 16  # fewer would be padded by a product on CPU


class Scored(NamedTuple):
    """logprobs: [S] float32. is_best: [S] bool, no token is likelier. is_nan: [S] bool, as in sampling."""

    logprobs: Tensor
    is_best: Tensor
    is_nan: Tensor


class Best(NamedTuple):
    """token_ids: [S, k] int64, the likeliest first. logprobs: [S, k] float32."""

    token_ids: Tensor
    logprobs: Tensor


def rows_at_a_time(vocab_size: int) -> int:
    """How many rows of logits are made and scored at once, so that a long prompt takes no more memory than a short."""
    return max(MIN_SCORE_ROWS, SCORE_BYTES // (LOGIT_BYTES * vocab_size))


def score(logits: Tensor, targets: Tensor) -> Scored:
    """Semantics: logprobs[i] = log_softmax(logits[i])[targets[i]]. logits: [S, V] float32, targets: [S] int64.

    Where is_nan is set, the row's other results mean nothing.
    """
    total = logits.logsumexp(-1)
    logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - total
    return Scored(logprobs, logits.argmax(-1) == targets, ~total.isfinite())


def best_tokens(logits: Tensor, k: int) -> Best:
    """The k tokens with the highest logits (all, where there are fewer). logits: [S, V] float32, not mutated."""
    k = min(k, logits.shape[1])
    # Logits as whole numbers of the same order, and the id below them: no two are equal, so any top-k is the same.
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 equals 0
    order = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    lower_first = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    token_ids = ((order << 32) | lower_first).topk(k, dim=-1).indices
    return Best(token_ids, logits.gather(1, token_ids) - logits.logsumexp(-1, keepdim=True))
