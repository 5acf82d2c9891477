"""The layout of a rank tile that the CUDA kernels read: blocks of 512 bytes in the order of a warp's lanes.

csrc/medley.h has the format. The reason: a warp reads a block with one 16-byte load a lane, and what a lane gets is
its operand of the tensor cores' instruction, so that nothing is rearranged between memory and product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley_worker.ops.lora_stage import TILE_RANKS, GroupShape, tile_layout

BLOCK = 32  # of K in a block of A, columns in a block of B
BLOCK_ELEMENTS = BLOCK * TILE_RANKS


def _blocks(features: int) -> int:
    return -(-features // BLOCK)


@dataclass(frozen=True, slots=True)
class FragmentLayout:
    """The shape of a tile. All tiles have one size, that of the largest group, so that any tile fits any group.

    A group's tile is [L] times: the blocks of A site by site, then the blocks of B site by site.
    """

    num_layers: int
    groups: tuple[GroupShape, ...]

    def group(self, name: str) -> GroupShape:
        return next(group for group in self.groups if group.name == name)

    @property
    def tile_elements(self) -> int:
        """Numbers in one tile."""
        return max(map(self.group_elements, self.groups))

    def group_elements(self, group: GroupShape) -> int:
        """Numbers that a group's tile holds, from its start."""
        return self.num_layers * self.layer_elements(group)

    def layer_elements(self, group: GroupShape) -> int:
        """Numbers that one layer of a group's tile takes."""
        return self._b_start(group, group.num_sites)

    def _b_start(self, group: GroupShape, site: int) -> int:
        blocks = group.num_sites * _blocks(group.in_features)
        return (blocks + sum(map(_blocks, group.out_features[:site]))) * BLOCK_ELEMENTS

    def write(self, tile: Tensor, group: GroupShape, in_group: int, layer: int, a: Tensor, b: Tensor) -> None:
        """Write one site of one layer. tile: [tile_elements], mutated. a: [r, in], b: [out, r], r at most 8."""
        self.write_layers(tile, group, in_group, [layer], a.unsqueeze(0), b.unsqueeze(0))

    def write_layers(
        self, tile: Tensor, group: GroupShape, in_group: int, layers: list[int], a: Tensor, b: Tensor
    ) -> None:
        """Write one site of n layers. tile: [tile_elements], mutated. a: [n, r, in], b: [n, out, r], r at most 8."""
        count, ranks, depth = a.shape
        width = b.shape[1]
        assert (depth, width) == (group.in_features, group.out_features[in_group]), "a site has one shape"
        by_layer = tile[: self.num_layers * self.layer_elements(group)].view(self.num_layers, -1)
        k_blocks, n_blocks = _blocks(depth), _blocks(width)
        rows = a.new_zeros((count, TILE_RANKS, k_blocks * BLOCK))
        rows[:, :ranks, :depth] = a
        start = in_group * k_blocks * BLOCK_ELEMENTS
        by_layer[layers, start : start + k_blocks * BLOCK_ELEMENTS] = (
            rows.view(count, TILE_RANKS, k_blocks, BLOCK).transpose(1, 2).reshape(count, -1)
        )
        columns = b.new_zeros((count, n_blocks * BLOCK, TILE_RANKS))
        columns[:, :width, :ranks] = b
        start = self._b_start(group, in_group)
        # Column c of a block is 8 (lane / 8) + 2 j + (lane / 4) % 2, rank r is 2 (lane % 4) + e: [lane][j][e].
        by_layer[layers, start : start + n_blocks * BLOCK_ELEMENTS] = (
            columns.view(count, n_blocks, 4, 4, 2, 4, 2).permute(0, 1, 2, 4, 5, 3, 6).reshape(count, -1)
        )


def fragment_layout(model: BaseModel) -> FragmentLayout:
    """The layout that this model's linear layers give.

    Raises ValueError for a model whose widths the kernels cannot read with 16-byte loads.
    """
    layout = tile_layout(model)
    for group in layout.groups:
        for name, features in (("in_features", group.in_features), *(("out_features", n) for n in group.out_features)):
            if features % 8:
                raise ValueError(f"{group.name}.{name}: got {features}, wanted a multiple of 8 for LoRA on CUDA")
    return FragmentLayout(layout.num_layers, layout.groups)


def dense_weights(
    layout: FragmentLayout, tiles: Tensor, group: GroupShape, site: int, layer: int
) -> tuple[Tensor, Tensor]:
    """(A [in, R], B [R, out]) of tiles [n, tile_elements], R = 8 n: what `write` wrote, for judges and references."""
    count, k_blocks = len(tiles), _blocks(group.in_features)
    elements = layout.layer_elements(group)
    here = tiles[:, layer * elements : (layer + 1) * elements]
    start = site * k_blocks * BLOCK_ELEMENTS
    a = here[:, start : start + k_blocks * BLOCK_ELEMENTS].reshape(count, k_blocks, TILE_RANKS, BLOCK)
    a = a.permute(1, 3, 0, 2).reshape(k_blocks * BLOCK, count * TILE_RANKS)[: group.in_features]
    width = group.out_features[site]
    n_blocks, start = _blocks(width), layout._b_start(group, site)
    b = here[:, start : start + n_blocks * BLOCK_ELEMENTS].reshape(count, n_blocks, 4, 2, 4, 4, 2)
    b = b.permute(0, 4, 6, 1, 2, 5, 3).reshape(count * TILE_RANKS, n_blocks * BLOCK)[:, :width]
    return a, b


def random_tiles(
    layout: FragmentLayout, count: int, dtype: torch.dtype, device: torch.device | str, std: float
) -> Tensor:
    """[count, tile_elements] of normal numbers, the padding of blocks included: for benchmarks of memory traffic."""
    tiles = torch.empty((count, layout.tile_elements), dtype=dtype, device=device)
    return tiles.normal_(std=std)
