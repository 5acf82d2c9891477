"""The paged KV cache: owns its memory. It does not know which sequence holds which page."""

from __future__ import annotations

import torch
from torch import Tensor

from medley_worker.ops.memory import Memory, PlainMemory

# Tokens a page. On CPU a page is one item of a batched product, so small pages cost calls.
CPU_PAGE_SIZE = 32
CUDA_PAGE_SIZE = 16


def kv_page_size(device: torch.device | str) -> int:
    """Tokens a page where nobody says."""
    return CUDA_PAGE_SIZE if torch.device(device).type == "cuda" else CPU_PAGE_SIZE


class KVCache:
    """Keys and values of all layers in fixed pages, in `dtype`; laid out as the device's attention reads them.

    CPU: k per layer [num_pages, Hkv, D, P], v per layer [num_pages, Hkv, P, D]. With the heads outermost,
    (page, head) is one axis with one stride, so attention reads the cache without copying it; keys are stored
    transposed because products want their right side row-major.

    CUDA: k and v per layer [num_pages + 1, P, Hkv, D], the two halves of [num_pages + 1, 2, P, Hkv, D]. The last
    page is `spare_page`: nobody owns it, and padded rows write there.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        page_size: int,
        memory: Memory | None = None,
    ) -> None:
        """memory: where it lies on `device`; None: torch's own."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.spare_page = num_pages
        memory = PlainMemory(torch.device(device)) if memory is None else memory
        if torch.device(device).type == "cuda":
            shape = (num_layers, num_pages + 1, 2, page_size, num_kv_heads, head_dim)
            self._k, self._v = memory.cleared(shape, dtype).unbind(2)
        else:
            pages = (num_layers, num_pages, num_kv_heads)
            self._k = memory.cleared((*pages, head_dim, page_size), dtype)
            self._v = memory.cleared((*pages, page_size, head_dim), dtype)
        self.k: tuple[Tensor, ...] = tuple(self._k.unbind(0))
        self.v: tuple[Tensor, ...] = tuple(self._v.unbind(0))

    def clear(self, pages: Tensor) -> None:
        """Zero these pages ([n] int64) in all layers.

        What a page held before must not reach its next owner: masked values are multiplied by 0, and 0 x NaN is NaN.
        """
        self._k.index_fill_(1, pages, 0)
        self._v.index_fill_(1, pages, 0)

    @staticmethod
    def page_bytes(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int) -> int:
        """Bytes that one page takes over all layers, keys and values."""
        return 2 * num_layers * num_kv_heads * page_size * head_dim * dtype.itemsize
