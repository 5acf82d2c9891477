"""The paged KV cache: owns its memory. It does not know which sequence holds which page."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_SIZE = 32  # tokens a page; on CPU a page is one item of a batched product, so small pages cost calls


class KVCache:
    """Keys and values of all layers in fixed pages.

    k: per layer [num_pages, Hkv, D, P], v: per layer [num_pages, Hkv, P, D], in `dtype`. With the heads outermost,
    (page, head) is one axis with one stride, so attention reads the cache without copying it; keys are stored
    transposed because products want their right side row-major.
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
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        pages = (num_layers, num_pages, num_kv_heads)
        self._k = torch.zeros((*pages, head_dim, page_size), dtype=dtype, device=device)
        self._v = torch.zeros((*pages, page_size, head_dim), dtype=dtype, device=device)
        self.k: tuple[Tensor, ...] = tuple(self._k.unbind(0))
        self.v: tuple[Tensor, ...] = tuple(self._v.unbind(0))

    def clear(self, pages: Tensor) -> None:
        """Zero these pages ([n] int64) in all layers.

        What a page held before must not reach its next owner: masked values are multiplied by 0, and 0 x NaN is NaN.
        """
        self._k.index_fill_(1, pages, 0)
        self._v.index_fill_(1, pages, 0)

    @staticmethod
    def page_bytes(
        *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = PAGE_SIZE
    ) -> int:
        """Bytes that one page takes over all layers, keys and values."""
        return 2 * num_layers * num_kv_heads * page_size * head_dim * dtype.itemsize
