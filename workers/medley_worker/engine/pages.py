"""Owns the indices of the KV pages: which are free, which are held.

Knows nothing of sequences, tensors or what a page holds.
"""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """A fixed number of pages of `page_size` tokens each, handed out by index."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a page pool wants pages and a size of 1 or more, got {num_pages} x {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        # Last in, first out: a page used a moment ago is still in cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_held = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` indices that nobody else holds. The caller has looked at `num_free`."""
        assert 0 <= num_pages <= len(self._free), "allocate() beyond the free pages"
        if num_pages == 0:
            return []
        pages = self._free[-num_pages:]
        del self._free[-num_pages:]
        for page in pages:
            self._is_held[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give back pages that `allocate` handed out."""
        for page in pages:
            assert self._is_held[page], f"page {page} is freed twice"
            self._is_held[page] = 0
        self._free.extend(pages)

    def check_integrity(self, held: Sequence[int]) -> None:
        """Every page is either free or in `held` (all pages that rows hold), and none is both or twice."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert len(set(held)) == len(held), "a page is held twice"
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "pages are lost or shared"
        assert sum(self._is_held) == len(held), "the held marks disagree with the free list"
