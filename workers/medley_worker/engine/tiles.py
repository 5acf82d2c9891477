"""Which adapter holds which tiles: acquire, release, pin, and whom to evict. Plain Python, no tensors, no files."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Holding:
    tiles: tuple[int, ...]
    pins: int = 0
    used_at: int = 0  # the pool's own clock: one tick a use


class TilePool(Generic[K]):
    """A fixed number of tiles, held by owners (adapters). Low tiles are given out first.

    Eviction is by next use: of the owners that nobody has pinned, first those with no known next use (least
    recently used first), then those whose next use is farthest.
    """

    def __init__(self, num_tiles: int) -> None:
        self.num_tiles = num_tiles
        self._free = list(range(num_tiles))
        self._holdings: dict[K, _Holding] = {}
        self._next_use: dict[K, int] = {}
        self._clock = 0
        self._num_evictable = 0  # tiles of owners that are not pinned

    @property
    def num_used(self) -> int:
        return self.num_tiles - len(self._free)

    @property
    def num_available(self) -> int:
        """Tiles that can be had now: free ones and those of owners that nobody has pinned."""
        return len(self._free) + self._num_evictable

    def owners(self) -> list[K]:
        """Everyone who holds tiles, earliest acquired first."""
        return list(self._holdings)

    def __contains__(self, owner: K) -> bool:
        return owner in self._holdings

    def acquire(self, owner: K, count: int) -> tuple[int, ...]:
        """`count` free tiles for a new owner, unpinned. The caller has made room (`victims`)."""
        assert owner not in self._holdings, "an owner acquires once"
        assert 0 < count <= len(self._free), "acquire follows eviction"
        tiles = tuple(heapq.heappop(self._free) for _ in range(count))
        self._holdings[owner] = _Holding(tiles)
        self._num_evictable += count
        self.touch(owner)
        return tiles

    def release(self, owner: K) -> None:
        """Give all its tiles back. It must not be pinned."""
        holding = self._holdings.pop(owner)
        assert holding.pins == 0, "a pinned owner keeps its tiles"
        self._num_evictable -= len(holding.tiles)
        for tile in holding.tiles:
            heapq.heappush(self._free, tile)

    def pin(self, owner: K) -> None:
        """Keep its tiles until as many `unpin`s."""
        holding = self._holdings[owner]
        if holding.pins == 0:
            self._num_evictable -= len(holding.tiles)
        holding.pins += 1
        self.touch(owner)

    def unpin(self, owner: K) -> None:
        holding = self._holdings[owner]
        assert holding.pins > 0, "unpin follows pin"
        holding.pins -= 1
        if holding.pins == 0:
            self._num_evictable += len(holding.tiles)

    def is_pinned(self, owner: K) -> bool:
        holding = self._holdings.get(owner)
        return holding is not None and holding.pins > 0

    def touch(self, owner: K) -> None:
        """Note a use."""
        self._clock += 1
        self._holdings[owner].used_at = self._clock

    def set_upcoming(self, owners: Sequence[K]) -> None:
        """Who is used next, nearest first; replaces what was known."""
        self._next_use = {}
        for place, owner in enumerate(owners):
            self._next_use.setdefault(owner, place)

    def victims(self, count: int) -> list[K] | None:
        """Whom to release so that `count` tiles are free: [] if they are, None if even all unpinned do not do."""
        if count > self.num_available:
            return None
        missing = count - len(self._free)
        if missing <= 0:
            return []
        chosen: list[K] = []
        for owner in sorted((k for k, h in self._holdings.items() if h.pins == 0), key=self._eviction_order):
            chosen.append(owner)
            missing -= len(self._holdings[owner].tiles)
            if missing <= 0:
                break
        return chosen

    def _eviction_order(self, owner: K) -> tuple[int, int, int]:
        next_use = self._next_use.get(owner)
        used_at = self._holdings[owner].used_at
        return (0, 0, used_at) if next_use is None else (1, -next_use, used_at)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every tile has exactly one place and the counts agree."""
        held = [tile for holding in self._holdings.values() for tile in holding.tiles]
        assert sorted(held + self._free) == list(range(self.num_tiles)), "a tile is lost or held twice"
        assert all(holding.pins >= 0 and holding.tiles for holding in self._holdings.values())
        evictable = sum(len(holding.tiles) for holding in self._holdings.values() if holding.pins == 0)
        assert evictable == self._num_evictable, "the count of evictable tiles is wrong"
