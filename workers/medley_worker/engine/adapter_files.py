"""An adapter's files as packed tiles in host memory. Owns reading and packing; knows no pool and no schedule."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.spec.adapters import WEIGHTS_NAME, AdapterHeader, AdapterRefused, AdapterTarget, read_adapter
from medley.spec.base_models import BaseModel
from medley_worker.ops.lora_stage import SITES, TILE_RANKS, TileLayout


class AdapterUnavailable(Exception):
    """An adapter whose files could not be read, or are not what they should be."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """tiles: [n, tile_elements] on the host, group by group as `num_tiles` counts them. scales: [L, sites] float32."""

    tiles: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A registered adapter: where it lies and how many tiles each group takes."""

    path: Path
    header: AdapterHeader
    num_tiles: dict[str, int]  # group -> tiles; groups not adapted are absent

    @property
    def tiles_needed(self) -> int:
        return sum(self.num_tiles.values())


def read_source(path: Path, model: BaseModel, layout: TileLayout) -> AdapterSource:
    """Read and check an adapter's configuration and header. Raises AdapterUnavailable."""
    try:
        header = read_adapter(path, model)
    except (AdapterRefused, OSError) as error:
        raise AdapterUnavailable(f"{error}") from error
    num_tiles: dict[str, int] = {}
    for group in layout.groups:
        names = SITES[group.first_site : group.first_site + group.num_sites]
        ranks = [target.rank for target in header.targets if target.site in names]
        if ranks:
            num_tiles[group.name] = -(-max(ranks) // TILE_RANKS)
    return AdapterSource(path, header, num_tiles)


def pack_adapter(source: AdapterSource, layout: TileLayout, dtype: torch.dtype) -> PackedAdapter:
    """Read an adapter's weights into tiles. Ranks up to the next multiple of 8 are zeros. Raises AdapterUnavailable."""
    tiles = torch.zeros((source.tiles_needed, layout.tile_elements), dtype=dtype)
    scales = torch.zeros((layout.num_layers, len(SITES)))
    try:
        with safe_open(source.path / WEIGHTS_NAME, framework="pt") as weights:
            for target in source.header.targets:
                a, b = weights.get_tensor(target.a_name), weights.get_tensor(target.b_name)
                _pack_target(target, a.to(dtype), b.to(dtype), tiles, source, layout)
                scales[target.layer, SITES.index(target.site)] = target.scale
    except (SafetensorError, OSError) as error:
        raise AdapterUnavailable(f"{source.path / WEIGHTS_NAME} could not be read: {error}") from error
    # An upload's values were looked at; here one may have become infinite in a narrower dtype.
    if not bool(tiles.isfinite().all()):
        raise AdapterUnavailable(f"{source.path / WEIGHTS_NAME} holds NaN or infinity in {dtype}")
    return PackedAdapter(tiles, scales)


def _pack_target(
    target: AdapterTarget, a: Tensor, b: Tensor, tiles: Tensor, source: AdapterSource, layout: TileLayout
) -> None:
    """Write one site of one layer. a: [r, in], b: [out, r]. tiles is mutated."""
    site = SITES.index(target.site)
    first_tile = 0
    for group in layout.groups:
        in_group = site - group.first_site
        if 0 <= in_group < group.num_sites:
            break
        first_tile += source.num_tiles.get(group.name, 0)
    for tile, start in enumerate(range(0, target.rank, TILE_RANKS), start=first_tile):
        ranks = slice(start, min(start + TILE_RANKS, target.rank))
        count = ranks.stop - ranks.start
        here = tiles[tile : tile + 1]
        layout.a_view(here, group)[0, target.layer, :, in_group, :count] = a[ranks].t()
        layout.b_view(here, group, in_group)[0, target.layer, :count] = b[:, ranks].t()


class HostCopies:
    """Packed adapters kept in host memory, the least recently used dropped past `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._copies: OrderedDict[object, PackedAdapter] = OrderedDict()

    def get(self, key: object) -> PackedAdapter | None:
        copy = self._copies.get(key)
        if copy is not None:
            self._copies.move_to_end(key)
        return copy

    def put(self, key: object, copy: PackedAdapter) -> None:
        self.drop(key)
        if copy.tiles.nbytes > self.limit_bytes:
            return
        self._copies[key] = copy
        self.used_bytes += copy.tiles.nbytes
        while self.used_bytes > self.limit_bytes:
            _, dropped = self._copies.popitem(last=False)
            self.used_bytes -= dropped.tiles.nbytes

    def drop(self, key: object) -> None:
        dropped = self._copies.pop(key, None)
        if dropped is not None:
            self.used_bytes -= dropped.tiles.nbytes

    def check_integrity(self) -> None:
        """Raises AssertionError unless the count of bytes is right and below the limit."""
        assert self.used_bytes == sum(copy.tiles.nbytes for copy in self._copies.values())
        assert self.used_bytes <= self.limit_bytes
