"""An adapter's files as packed tiles: all of it, or one rank's share.

Owns reading and packing; knows no pool, no schedule and no tile's inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.spec.adapters import WEIGHTS_NAME, AdapterHeader, AdapterRefused, AdapterTarget, read_adapter
from medley.spec.base_models import BaseModel, linear_sites
from medley_worker.models.sharding import Shard
from medley_worker.ops.lora_stage import SITES, TILE_RANKS, GroupShape


class AdapterUnavailable(Exception):
    """An adapter whose files could not be read, or are not what they should be."""


class Layout(Protocol):
    """How a device wants its tiles. `ops` has one for each device."""

    @property
    def num_layers(self) -> int: ...

    @property
    def groups(self) -> tuple[GroupShape, ...]: ...

    @property
    def tile_elements(self) -> int: ...

    def group(self, name: str) -> GroupShape: ...

    def group_elements(self, group: GroupShape) -> int:
        """Numbers that a group's tile holds, from its start."""
        ...

    def write_layers(
        self, tile: Tensor, group: GroupShape, in_group: int, layers: list[int], a: Tensor, b: Tensor
    ) -> None:
        """Write one site of n layers. tile: [tile_elements], mutated. a: [n, r, in], b: [n, out, r], r at most 8."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A registered adapter: where it lies and how many tiles each group takes."""

    path: Path
    header: AdapterHeader
    num_tiles: dict[str, int]  # group -> tiles; groups not adapted are absent
    site_masks: dict[str, int]  # group -> bit s: its site s is adapted in some layer

    @property
    def tiles_needed(self) -> int:
        return sum(self.num_tiles.values())


def read_source(path: Path, model: BaseModel, layout: Layout) -> AdapterSource:
    """Read and check an adapter's configuration and header. Raises AdapterUnavailable."""
    try:
        header = read_adapter(path, model)
    except (AdapterRefused, OSError) as error:
        raise AdapterUnavailable(f"{error}") from error
    num_tiles: dict[str, int] = {}
    site_masks: dict[str, int] = {}
    for group in layout.groups:
        names = SITES[group.first_site : group.first_site + group.num_sites]
        adapted = [target for target in header.targets if target.site in names]
        if adapted:
            num_tiles[group.name] = -(-max(target.rank for target in adapted) // TILE_RANKS)
            site_masks[group.name] = sum(1 << names.index(site) for site in {target.site for target in adapted})
    return AdapterSource(path, header, num_tiles, site_masks)


def pack_adapter(source: AdapterSource, shard: Shard, layout: Layout, tiles: Sequence[Tensor], scales: Tensor) -> None:
    """Read a shard's share of an adapter's weights into tiles. Ranks up to the next multiple of 8 are zeros.

    A site divided by its outputs has all of A and a share of B, one divided by its inputs a share of A and all of B:
    the sum over the shards of y += scale * (x @ A) @ B is the whole's. layout: of the shard's part.
    tiles: source.tiles_needed of [tile_elements], on the host, mutated; group by group as `num_tiles` counts them.
    scales: [L, sites] float32, mutated; 0 where not adapted. Raises AdapterUnavailable.
    """
    for tile in tiles:
        tile.zero_()
    scales.zero_()
    for target in source.header.targets:
        scales[target.layer, SITES.index(target.site)] = target.scale
    try:
        with safe_open(source.path / WEIGHTS_NAME, framework="pt") as weights:
            first = 0
            for group in layout.groups:
                count = source.num_tiles.get(group.name, 0)
                for in_group in range(group.num_sites):
                    name = SITES[group.first_site + in_group]
                    _pack_site(weights, source, name, shard, layout, group, in_group, tiles[first : first + count])
                first += count
    except (SafetensorError, OSError) as error:
        raise AdapterUnavailable(f"{source.path / WEIGHTS_NAME} could not be read: {error}") from error


def _pack_site(
    weights: safe_open,
    source: AdapterSource,
    site: str,
    shard: Shard,
    layout: Layout,
    group: GroupShape,
    in_group: int,
    tiles: Sequence[Tensor],
) -> None:
    """Write one site of all layers, those of one rank together."""
    (linear,) = (linear for linear in linear_sites(shard.whole) if linear.name == site)
    inputs, outputs = shard.inputs(linear), shard.outputs(linear)
    by_rank: dict[int, list[AdapterTarget]] = {}
    for target in source.header.targets:
        if target.site == site:
            by_rank.setdefault(target.rank, []).append(target)
    for rank, targets in by_rank.items():
        layers = [target.layer for target in targets]
        # Read and judged whole, so that every rank refuses what one refuses.
        a = _stack(weights, source, [target.a_name for target in targets], tiles[0].dtype)[:, :, inputs]  # [n, r, in]
        b = _stack(weights, source, [target.b_name for target in targets], tiles[0].dtype)[:, outputs]  # [n, out, r]
        for tile, start in zip(tiles, range(0, rank, TILE_RANKS), strict=False):
            ranks = slice(start, min(start + TILE_RANKS, rank))
            layout.write_layers(tile, group, in_group, layers, a[:, ranks], b[:, :, ranks])


def _stack(weights: safe_open, source: AdapterSource, names: list[str], dtype: torch.dtype) -> Tensor:
    """Tensors of one shape as one [n, ...] in `dtype`."""
    stacked = torch.stack([weights.get_tensor(name) for name in names]).to(dtype)  # type: ignore[no-untyped-call]
    # An upload's values were looked at; here one may have become infinite in a narrower dtype.
    low, high = stacked.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise AdapterUnavailable(f"{source.path / WEIGHTS_NAME} holds NaN or infinity in {dtype}")
    return stacked
