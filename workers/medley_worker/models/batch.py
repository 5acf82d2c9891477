"""What one forward pass is given: tokens, positions, pages, adapters. It does not know requests or schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley_worker.ops.attention import AttentionPlan, plan_attention
from medley_worker.ops.lora import LoraBatch
from medley_worker.ops.paged import PagedPlan

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's rows: decode rows (one token each) first, then prefill chunks. `build_batch` makes it for CPU."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, on CUDA int32
    num_decode_rows: int
    logit_rows: Tensor | None  # [R] int, the token rows whose logits are wanted; None: all
    attention: AttentionPlan | PagedPlan
    lora: object | None  # the backend's own: LoraBatch on CPU, SgmvBatch on CUDA


def build_batch(
    *,
    token_ids: Sequence[int] | IntArray,
    qo_indptr: Sequence[int] | IntArray,
    kv_len: Sequence[int] | IntArray,
    page_table: IntArray,
    num_decode_rows: int,
    logit_rows: Sequence[int] | IntArray,
    page_size: int,
    lora: LoraBatch | None = None,
    device: torch.device | str = "cpu",
) -> ForwardBatch:
    """A ForwardBatch from plain data on the host.

    token_ids: [T], all sequences' new tokens in order. qo_indptr: [B+1]. kv_len: [B], each sequence's length
    including its new tokens (so the new tokens' positions are kv_len - n .. kv_len - 1). page_table:
    [B, max_pages], each sequence's pages in order, padded with anything. The first `num_decode_rows` sequences
    have exactly one new token each. logit_rows: [R] indices into the T token rows.
    """
    ends = np.asarray(qo_indptr, dtype=np.int64)
    lengths = np.asarray(kv_len, dtype=np.int64)
    table = np.asarray(page_table, dtype=np.int64)
    num_new = np.diff(ends)
    assert (num_new[:num_decode_rows] == 1).all(), "decode rows hold one token each"
    positions = np.arange(ends[-1]) - np.repeat(ends[1:] - lengths, num_new)
    return ForwardBatch(
        token_ids=torch.as_tensor(np.asarray(token_ids, dtype=np.int64), device=device),
        positions=torch.as_tensor(positions, device=device),
        num_decode_rows=num_decode_rows,
        logit_rows=torch.as_tensor(np.asarray(logit_rows, dtype=np.int64), device=device),
        attention=plan_attention(ends, lengths, table, num_decode_rows, page_size, device=device),
        lora=lora,
    )
