"""The LoRA sites of one decode step of a model, with random adapters for all layers, as work that can be captured.

Weights are random numbers filled in by the device: which tile holds what makes no difference to time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.shapes import adapter_weight_bytes
from medley.spec.base_models import BaseModel
from medley_worker.ops.lora_stage import SITES, TILE_RANKS, AdapterTiles
from medley_worker.ops.sgmv import SgmvBatch, SgmvLora, sgmv_apply
from medley_worker.ops.sgmv_layout import FragmentLayout, fragment_layout, random_tiles

WEIGHT_STD = 0.02
SCALE = 2.0**-10  # so small that the values, added to again and again, stay finite over thousands of replays
RESERVE_BYTES = 6 << 30  # activations, the buffer that empties the L2, the context


MakeLora = Callable[[FragmentLayout, Tensor, int, int], SgmvLora]


class TilesShort(Exception):
    """More tiles wanted than the device has memory for."""


class LoraSites:
    """A pool of random tiles, and the sites of a step over it."""

    def __init__(self, model: BaseModel, *, num_tiles: int, max_tokens: int, max_adapters: int) -> None:
        """num_tiles: as many as memory has room for, up to this many, are made."""
        self.model, self.layout = model, fragment_layout(model)
        tile_bytes = self.layout.tile_elements * 2
        free, _ = torch.cuda.mem_get_info()
        self.num_tiles = min(num_tiles, (free - RESERVE_BYTES) // tile_bytes - 1)
        pool = random_tiles(self.layout, self.num_tiles + 1, torch.bfloat16, "cuda", WEIGHT_STD)
        self._pool, self._max_tokens, self._max_adapters = pool, max_tokens, max_adapters
        self.use(SgmvLora)
        self._scales = torch.full((model.num_layers, len(SITES)), SCALE, device="cuda")
        self._load_ids = itertools.count()
        widths = {group.name: sum(group.out_features) for group in self.layout.groups}
        self._y = {
            name: torch.zeros((max_tokens, width), dtype=torch.bfloat16, device="cuda")
            for name, width in widths.items()
        }
        self._y["down"].normal_()

    def use(self, make: MakeLora) -> None:
        """Measure this variant of SGMV from here on."""
        self.lora = make(self.layout, self._pool, self._max_tokens, self._max_adapters)

    def tiles_needed(self, ranks: Sequence[int]) -> int:
        """Tiles of adapters of these ranks on all sites."""
        return sum(math.ceil(rank / TILE_RANKS) for rank in ranks) * len(self.layout.groups)

    def adapters(self, ranks: Sequence[int]) -> list[AdapterTiles]:
        """Adapters of these ranks, no two of which share a tile. Raises TilesShort."""
        wanted = self.tiles_needed(ranks)
        if wanted > self.num_tiles:
            raise TilesShort(f"{wanted} tiles are wanted, {self.num_tiles} fit into the device's memory")
        tiles = iter(range(self.num_tiles))
        masks = {group.name: (1 << group.num_sites) - 1 for group in self.layout.groups}
        found = []
        for rank in ranks:
            count = math.ceil(rank / TILE_RANKS)
            dealt = {group.name: tuple(itertools.islice(tiles, count)) for group in self.layout.groups}
            found.append(AdapterTiles(next(self._load_ids), dealt, self._scales, masks))
        return found

    def upload(self, ranks: Sequence[int], rows: Sequence[int]) -> SgmvBatch:
        """The work list of one decode row for each entry of `rows`, which indexes `ranks`; all graphs read it."""
        adapters = self.adapters(ranks)
        batch = self.lora.batch([adapters[row] for row in rows], [1] * len(rows))
        assert batch is not None, "every row has an adapter"
        return batch

    def step(self, num_rows: int, batch: SgmvBatch, groups: Sequence[str] = ()) -> None:
        """All sites of a decode step in the model's order, each reading what the one before it wrote.

        groups: these alone; none: all.
        """
        hidden, inner = self.model.hidden_size, self.model.intermediate_size
        q_out = self.model.num_heads * self.model.head_dim
        y = {name: tensor[:num_rows] for name, tensor in self._y.items()}
        inputs = {
            "qkv": y["down"][:, :hidden],
            "o": y["qkv"][:, :q_out],
            "gate_up": y["o"][:, :hidden],
            "down": y["gate_up"][:, :inner],
        }
        for layer in range(self.model.num_layers):
            for group in groups or inputs:
                sgmv_apply(y[group], inputs[group], group, layer, batch)

    def floor_bytes(self, ranks: Sequence[int]) -> int:
        """Weight bytes that a step reads at the least: each adapter's once."""
        return sum(adapter_weight_bytes(self.model, rank) for rank in ranks)
