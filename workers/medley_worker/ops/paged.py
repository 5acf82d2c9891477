"""What the layers of one step share on CUDA, and how much workspace their attention takes.

Plain data and arithmetic: it knows no FlashInfer (`paged_attention` does) and runs anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medley.spec.base_models import BaseModel

# FlashInfer's decode kernel on CUDA cores reads K and V once for each query head of a group; from 4 on a group,
# its tensor core kernel is faster, and it alone takes any group.
TENSOR_CORE_GROUP = 4
MIN_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
HEAD_DIMS = (64, 128, 256)
# scheduler.cuh: a prefill plan counts on two blocks an SM, whose tiles hold up to 128 packed queries; a tile of a
# decode row holds 16 where that is enough for a group.
BLOCKS_PER_SM, PREFILL_TILE, DECODE_TILE = 2, 128, 16


class Kernel(Protocol):
    """A planned attention kernel."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """q, out: [tokens, Hq, D]; the cache's K and V: [pages, P, Hkv, D] each."""
        ...


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """One step's sequences: decode rows first, then chunks. Kernels by window (None: no window)."""

    num_decode_rows: int
    decode: Mapping[int | None, Kernel]  # planned for the decode rows
    prefill: Mapping[int | None, Kernel]  # planned for the chunks; empty where there are none
    positions: Tensor  # [T] int32
    sequences: Tensor  # [T] int32: the sequence of each token
    kv_indptr: Tensor  # [B+1] int32
    kv_indices: Tensor  # [kv_indptr[-1] or more] int32: pages, sequence by sequence
    last_page_len: Tensor  # [B] int32
    # Nothing to clear: FlashInfer reads no place that the sequence has not written.
    fresh_pages: None = None


def check_supported(config: BaseModel, dtype: torch.dtype) -> None:
    """Raises ValueError, naming the field, for a model that there is no attention for on CUDA."""
    if config.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: got {config.head_dim}, wanted one of {', '.join(map(str, HEAD_DIMS))} on cuda")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: got {str(dtype).removeprefix('torch.')}, wanted bfloat16 or float16 on cuda")


def window_left(window: int | None) -> int:
    """FlashInfer's count of keys before a query's own. window: keys a query sees, its own included; None: all."""
    return -1 if window is None else window - 1


def takes_tensor_cores(config: BaseModel) -> bool:
    """Whether decode attention runs on tensor cores."""
    return config.num_heads // config.num_kv_heads >= TENSOR_CORE_GROUP


def workspace_bytes(config: BaseModel, max_rows: int, num_sms: int) -> int:
    """Bytes that partial results of split attention take at most, float32: [tiles, Hq, queries a tile, D + 1]."""
    group = config.num_heads // config.num_kv_heads
    split_tiles = BLOCKS_PER_SM * num_sms // config.num_kv_heads
    prefill_queries = split_tiles * PREFILL_TILE
    tile = DECODE_TILE if group <= DECODE_TILE else PREFILL_TILE
    decode_queries = max(split_tiles, max_rows + -(-max_rows * group // tile)) * tile
    floats = max(prefill_queries, decode_queries) * config.num_heads * (config.head_dim + 1)
    return max(MIN_WORKSPACE_BYTES, 4 * floats + 4096)  # and what alignment costs
