"""The scores and the likeliest tokens that a step owes its rows, computed from logits a part at a time.

The same for CPU and CUDA; what is computed stays on the device until its owner brings it to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.rows import RowTable
from medley_worker.ops.scoring import Best, best_tokens, rows_at_a_time, score


class Targets(NamedTuple):
    """What a plan wants scored. places: [S], see `StepPlan.scored_places`. token_ids: [S], the tokens to be scored.

    num_top: the most alternatives that any of them wants.
    """

    places: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    num_top: int


class Found(NamedTuple):
    """Scores on the device: logprobs [S] float32, is_best, is_nan [S] bool, best [S, k] or None."""

    logprobs: Tensor
    is_best: Tensor
    is_nan: Tensor
    best: Best | None


def targets_of(plan: StepPlan, rows: RowTable) -> Targets | None:
    """None where nothing is to be scored, as in most steps."""
    chunks = plan.scored_chunks
    if not chunks:
        return None
    token_ids = [rows.token_ids[c.row, c.first_target : c.first_target + c.num_targets] for c in chunks]
    sequences = [rows.sequences[c.row] for c in chunks]
    num_top = max(s.findings.num_scored_top for s in sequences if s is not None and s.findings is not None)
    return Targets(plan.scored_places(), np.concatenate(token_ids).astype(np.int64), num_top)


def topped_rows(sampled: Rows, rows: RowTable) -> tuple[npt.NDArray[np.int64], int]:
    """(places in `sampled` of the rows that want the likeliest tokens, the most that any of them wants)."""
    num_top = rows.num_top[sampled]
    return np.flatnonzero(num_top), int(num_top.max(initial=0))


def score_rows(
    logits_of: Callable[[Tensor], Tensor], at: Tensor, token_ids: Tensor, num_top: int, vocab_size: int
) -> Found:
    """Score `token_ids` [S] int64, each in the logits of the token row `at` [S] int.

    logits_of: the logits [n, V] of some token rows [n]; asked for a part of `at` at a time.
    """
    parts = []
    size = rows_at_a_time(vocab_size)
    for rows, targets in zip(torch.split(at, size), torch.split(token_ids, size), strict=True):
        logits = logits_of(rows)
        parts.append((score(logits, targets), best_tokens(logits, num_top) if num_top else None))
    logprobs, is_best, is_nan = (torch.cat(columns) for columns in zip(*(part for part, _ in parts), strict=True))
    bests = [best for _, best in parts if best is not None]
    best = Best(*(torch.cat(columns) for columns in zip(*bests, strict=True))) if bests else None
    return Found(logprobs, is_best, is_nan, best)
