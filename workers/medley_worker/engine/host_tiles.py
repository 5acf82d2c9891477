"""Packed adapters in host memory: tiles of it, taken and given back, and which adapters' copies they hold.

Knows no files, no threads and no device tiles; a fence says when a copy out of a tile has ended.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from medley_worker.engine.copies import Copier, Fence
from medley_worker.engine.sequences import AdapterKey

# Memory comes in pieces of this size and stays: pinning takes 0.3 s a GiB, and stops launches meanwhile.
CHUNK_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class HostTile:
    """memory: [tile_elements]. scales: [L, sites] float32, of the adapter whose first tile this is.

    read_by: the end of the last copy out of it; wait for it before writing.
    """

    memory: Tensor
    scales: Tensor
    read_by: Fence | None = None


PackedAdapter = list[HostTile]  # group by group, in the order of ranks


class HostTiles:
    """Host tiles of one size, handed out last in, first out; there are as many as were ever in use at once."""

    def __init__(self, copier: Copier, tile_elements: int, dtype: torch.dtype, scales_shape: tuple[int, int]) -> None:
        self._copier, self._tile_elements, self._dtype = copier, tile_elements, dtype
        self._scales_shape = scales_shape
        self.tile_bytes = tile_elements * dtype.itemsize
        self._free: list[HostTile] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> PackedAdapter:
        """`count` tiles with anything in them. The caller has looked at `num_free`."""
        assert count <= len(self._free), "allocate() beyond the free tiles"
        tiles = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return tiles

    def new_tiles(self) -> PackedAdapter:
        """As many as a chunk holds, for `free`. Takes long; touches nothing else here, so it wants no lock."""
        count = max(1, CHUNK_BYTES // self.tile_bytes)
        memory = self._copier.new_host(count, self._tile_elements, self._dtype)
        scales = self._copier.new_host(count, math.prod(self._scales_shape), torch.float32)
        return list(map(HostTile, memory.unbind(0), scales.view(count, *self._scales_shape).unbind(0)))

    def free(self, tiles: PackedAdapter) -> None:
        self._free.extend(tiles)


class HostCopies:
    """Packed adapters kept up to `limit_bytes`, the least recently used dropped first."""

    def __init__(self, tiles: HostTiles, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._tiles = tiles
        self._copies: OrderedDict[AdapterKey, PackedAdapter] = OrderedDict()

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._copies

    def take(self, key: AdapterKey) -> PackedAdapter | None:
        """The adapter's copy, which is the caller's until `put`."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self.used_bytes -= self._bytes(copy)
        return copy

    def put(self, key: AdapterKey, copy: PackedAdapter) -> None:
        """Keep a copy, as the one used last."""
        assert key not in self._copies, "an adapter has one host copy"
        self._copies[key] = copy
        self.used_bytes += self._bytes(copy)

    def drop(self, key: AdapterKey) -> None:
        dropped = self.take(key)
        if dropped is not None:
            self._tiles.free(dropped)

    def make_room(self, num_bytes: int, kept: Container[AdapterKey] = ()) -> bool:
        """Drop copies that are not in `kept` until `num_bytes` more are within the limit; whether they are."""
        for key in list(self._copies):
            if self.used_bytes + num_bytes <= self.limit_bytes:
                break
            if key not in kept:
                self.drop(key)
        return self.used_bytes + num_bytes <= self.limit_bytes

    def _bytes(self, copy: PackedAdapter) -> int:
        return len(copy) * self._tiles.tile_bytes

    def check_integrity(self) -> None:
        """Raises AssertionError unless the count of bytes is right and no tile is held twice."""
        assert self.used_bytes == sum(map(self._bytes, self._copies.values()))
        held = [id(tile) for copy in self._copies.values() for tile in copy]
        assert len(set(held)) == len(held), "a host tile is held twice"
