"""The device's memory of adapters: tiles, scales, what lies in them, and the copies on their way there.

Who holds which tiles is told (`adapters` decides it, on every rank alike); which steps may still read what a copy is
about to overwrite is known here. Knows no files and no requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley_worker.engine.adapter_files import AdapterSource, Layout
from medley_worker.engine.copies import Copier, Fence
from medley_worker.engine.host_tiles import PackedAdapter
from medley_worker.engine.sequences import AdapterKey
from medley_worker.ops.lora import LoraBatch, build_lora_batch
from medley_worker.ops.lora_stage import SITES, AdapterTiles, LoraStage, TileLayout, tile_layout
from medley_worker.ops.memory import Memory


def layout_for(model: BaseModel, device: torch.device) -> Layout:
    """How tiles are laid out on `device`. Raises ValueError for a model that its kernels cannot run."""
    if device.type == "cuda":
        # Its layout is of use where its kernels can be built.
        from medley_worker.ops.sgmv_layout import fragment_layout

        return fragment_layout(model)
    return tile_layout(model)


class Lora(Protocol):
    """Makes the work of a step's adapters known to the device."""

    def batch(self, adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int]) -> object | None:
        """What the model's forward pass wants as its LoRA batch; None where no row has an adapter."""
        ...


class StagedLora:
    """For a CPU: copies of the tiles in use, laid out for batched products."""

    def __init__(self, stage: LoraStage) -> None:
        self.stage = stage

    def batch(self, adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int]) -> LoraBatch | None:
        return build_lora_batch(adapters, num_tokens, self.stage)


def _new_lora(layout: Layout, pool: Tensor, max_tokens: int, max_adapters: int, memory: Memory) -> Lora:
    if isinstance(layout, TileLayout):
        return StagedLora(LoraStage(layout, pool))
    from medley_worker.ops.sgmv import SgmvLora
    from medley_worker.ops.sgmv_layout import FragmentLayout

    assert isinstance(layout, FragmentLayout)
    return SgmvLora(layout, pool, max_tokens, max_adapters, memory=memory)


class AdapterMemory:
    """Tiles on one device, and the adapters that lie in them.

    | memory | who writes it, and when |
    | tiles, scales on the device | `place`, after the last step that reads their former owner |

    At most one step is unread while an adapter is placed, so of the steps before the last one nobody reads tiles.
    """

    def __init__(
        self,
        layout: Layout,
        copier: Copier,
        *,
        memory: Memory,
        num_tiles: int,
        dtype: torch.dtype,
        max_tokens: int,
        max_adapters: int,
    ) -> None:
        """max_tokens, max_adapters: of one step. memory: where tiles and workspaces lie on the device."""
        self._layout, self._copier = layout, copier
        self.num_tiles = num_tiles
        self.tiles = memory.cleared((num_tiles + 1, layout.tile_elements), dtype)  # the last one stays zeros
        # An adapter's scales lie where its first tile says, so that they live and die with it.
        self._scales = memory.cleared((num_tiles, layout.num_layers, len(SITES)), torch.float32)
        self.lora = _new_lora(layout, self.tiles, max_tokens, max_adapters, memory)
        self._resident: dict[AdapterKey, AdapterTiles] = {}
        self._last_batch: tuple[tuple[object, ...], object | None] = ((), None)
        self._arriving: dict[AdapterKey, Fence] = {}  # placed, and no step has waited for the copy
        self._step = 0  # how many steps were begun
        self._used_in: dict[AdapterKey, int] = {}  # the last step with it
        self._read_in = [0] * num_tiles  # the last step that read the tile for an owner that is gone

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._resident

    def __getitem__(self, key: AdapterKey) -> AdapterTiles:
        return self._resident[key]

    def keys(self) -> list[AdapterKey]:
        return list(self._resident)

    def place(
        self, key: AdapterKey, load_id: int, source: AdapterSource, tiles: Sequence[int], packed: PackedAdapter
    ) -> None:
        """Start the copies of an adapter into `tiles`, which nobody holds; `packed` is fenced and free to give back.

        It is there for the steps that begin after it. load_id: new with each call.
        """
        scales = self._scales[tiles[0]]
        is_read = max(self._read_in[tile] for tile in tiles) >= self._step > 0
        # A tile's end past its group's numbers is read by nobody.
        sizes = [
            self._layout.group_elements(self._layout.group(group))
            for group, count in source.num_tiles.items()
            for _ in range(count)
        ]
        pairs = [
            (self.tiles[tile, :size], host.memory[:size]) for tile, host, size in zip(tiles, packed, sizes, strict=True)
        ]
        fence = self._copier.copy([*pairs, (scales, packed[0].scales)], self._copier.mark() if is_read else None)
        for host in packed:
            host.read_by = fence
        self._arriving[key] = fence
        taken = iter(tiles)
        by_group = {group: tuple(itertools.islice(taken, count)) for group, count in source.num_tiles.items()}
        self._resident[key] = AdapterTiles(load_id, by_group, scales, source.site_masks)

    def release(self, key: AdapterKey) -> None:
        """An adapter's tiles are to be another's."""
        adapter = self._resident.pop(key)
        used_in = self._used_in.pop(key, 0)
        for tiles in adapter.tiles.values():
            for tile in tiles:
                self._read_in[tile] = used_in
        self._arriving.pop(key, None)  # copies follow each other, so the next owner's comes after it

    def forget_reads(self) -> None:
        """The memory is about to go, nobody lies in it, and no step is under way."""
        assert not self._resident, "adapters leave before the memory does"
        self._read_in = [0] * self.num_tiles
        self._last_batch = ((), None)  # its list of work names addresses of what was there

    def lora_batch(
        self, keys: Sequence[AdapterKey | None], num_tokens: Sequence[int], *, begins_step: bool = True
    ) -> object | None:
        """The LoRA batch of a pass: one resident key (None: the base) and number of new tokens a sequence, in order.

        None where no row has an adapter. Valid until the next call. A pass like the last one gets the same batch.
        Called once a pass, before anything of it is launched; begins_step: for the first pass of a step.
        """
        self._step += begins_step
        self._use(keys)
        adapters = [None if key is None else self._resident[key] for key in keys]
        composition = (*(None if a is None else a.load_id for a in adapters), *num_tokens)
        if self._last_batch[0] != composition:
            self._last_batch = (composition, self.lora.batch(adapters, num_tokens))
        return self._last_batch[1]

    def _use(self, keys: Sequence[AdapterKey | None]) -> None:
        for key in dict.fromkeys(keys):
            if key is not None:
                self._used_in[key] = self._step
                fence = self._arriving.pop(key, None)
                if fence is not None:
                    self._copier.join(fence)

    def check_integrity(self) -> None:
        """Raises AssertionError unless copies arrive for somebody and the stage is sound."""
        if isinstance(self.lora, StagedLora):
            self.lora.stage.check_integrity()
        assert set(self._arriving) <= set(self._resident), "a copy arrives for nobody"
