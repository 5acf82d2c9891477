"""Adapters on their way from disk through host memory into device tiles.

Owns the memory of tiles and what lies in it; `tiles` decides who holds which, `adapter_files` reads. It does not
know requests: pins and what comes next are told.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley_worker.engine.adapter_files import AdapterSource, AdapterUnavailable, Layout
from medley_worker.engine.adapter_loader import AdapterLoader, Wanted
from medley_worker.engine.copies import Copier, Fence, new_copier
from medley_worker.engine.sequences import AdapterKey
from medley_worker.engine.sizing import CPU_HOST_BYTES
from medley_worker.engine.tiles import TilePool
from medley_worker.ops.lora import LoraBatch, build_lora_batch
from medley_worker.ops.lora_stage import SITES, AdapterTiles, LoraStage, TileLayout, tile_layout
from medley_worker.ops.memory import Memory, PlainMemory

__all__ = ["AdapterCache", "AdapterKey", "AdapterTooLarge", "AdapterUnavailable", "layout_for"]


class AdapterTooLarge(Exception):
    """An adapter that needs more tiles than there are in all."""

    def __init__(self, key: AdapterKey, got: int, wanted: int) -> None:
        self.got, self.wanted = got, wanted
        super().__init__(f"adapter {key[1]} needs {got} tiles, the engine has {wanted}; raise its adapter memory")


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


class AdapterCache:
    """Resident adapters: registered by key, loaded into tiles, pinned while rows use them, evicted by next use.

    | memory | who writes it, and when |
    | tiles, scales on the device | `load`, after the last step that reads their former owner |
    | tiles, scales on the host | the loader, after the last copy out of them |

    At most one step is unread while an adapter is loaded, so of the steps before the last one nobody reads tiles.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        num_tiles: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        host_bytes: int = CPU_HOST_BYTES,
        max_tokens: int = 2048,
        max_adapters: int = 64,
        copier: Copier | None = None,
        memory: Memory | None = None,
    ) -> None:
        """max_tokens, max_adapters: of one step. copier: for tests; the device has its own.

        memory: where tiles and workspaces lie on the device; None: torch's own.
        """
        device = torch.device(device)
        memory = PlainMemory(device) if memory is None else memory
        self._copier = new_copier(device) if copier is None else copier
        layout = self._layout = layout_for(model, device)
        self._loader = AdapterLoader(model, layout, dtype, self._copier, host_bytes)
        self._memory = memory.cleared((num_tiles + 1, layout.tile_elements), dtype)  # the last one stays zeros
        # An adapter's scales lie where its first tile says, so that they live and die with it.
        self._scales = memory.cleared((num_tiles, layout.num_layers, len(SITES)), torch.float32)
        self.lora = _new_lora(layout, self._memory, max_tokens, max_adapters, memory)
        self._tiles: TilePool[AdapterKey] = TilePool(num_tiles)
        self._sources: dict[AdapterKey, AdapterSource] = {}
        self._paths: dict[AdapterKey, Path] = {}  # of adapters that come and are not registered
        self._resident: dict[AdapterKey, AdapterTiles] = {}
        self._load_ids = itertools.count()
        self._last_batch: tuple[tuple[object, ...], object | None] = ((), None)
        self._arriving: dict[AdapterKey, Fence] = {}  # loaded, and no step has waited for the copy
        self._step = 0  # how many steps were begun
        self._used_in: dict[AdapterKey, int] = {}  # the last step with it
        self._read_in = [0] * num_tiles  # the last step that read the tile for an owner that is gone
        self.loads = 0
        self.evictions = 0
        self.load_s = 0.0

    @property
    def num_tiles(self) -> int:
        return self._tiles.num_tiles

    @property
    def tiles_used(self) -> int:
        return self._tiles.num_used

    @property
    def num_registered(self) -> int:
        return len(self._sources)

    @property
    def loads_ahead(self) -> bool:
        """Whether what `set_upcoming` names is read ahead, and `is_ready` may say no."""
        return self._loader.is_ahead

    def register(self, key: AdapterKey, path: Path | str) -> None:
        """Make an adapter known. A known key is left as it is: what a key names never changes.

        Raises AdapterUnavailable (unreadable, or not an adapter of this base), AdapterTooLarge.
        """
        if key in self._sources:
            return
        source = self._loader.source(key, Path(path))
        if source.tiles_needed > self.num_tiles:
            raise AdapterTooLarge(key, source.tiles_needed, self.num_tiles)
        self._sources[key] = source

    def forget(self, key: AdapterKey) -> None:
        """Drop an adapter from everywhere. It must not be pinned. Unknown keys are ignored."""
        if key in self._tiles:
            self._release(key)
        self._loader.drop(key)
        self._sources.pop(key, None)

    def evict_all(self) -> None:
        """Leave every tile, before the device's memory goes. Nobody has pinned any, and no step is under way.

        Host copies stay.
        """
        for key in self.resident():
            self._release(key)
        self._read_in = [0] * self.num_tiles
        self._last_batch = ((), None)  # its list of work names addresses of what was there

    def prune(self, is_wanted: Callable[[AdapterKey], bool]) -> None:
        """Unregister what is neither resident nor wanted. Host copies stay: what a key names never changes."""
        self._sources = {k: s for k, s in self._sources.items() if k in self._resident or is_wanted(k)}

    def is_registered(self, key: AdapterKey) -> bool:
        return key in self._sources

    def tiles_needed(self, key: AdapterKey) -> int:
        """Tiles that a registered adapter takes."""
        return self._sources[key].tiles_needed

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self._resident

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether `load` would not wait for a disk."""
        return key in self._resident or self._loader.is_ready(key)

    def wait(self, timeout_s: float) -> None:
        """Wait until one more of those that come is ready, at most `timeout_s`."""
        self._loader.wait(timeout_s)

    def can_admit(self, key: AdapterKey) -> bool:
        """Whether a registered adapter is resident, or fits into free tiles and those that nobody has pinned."""
        return key in self._resident or self._sources[key].tiles_needed <= self._tiles.num_available

    def load(self, key: AdapterKey) -> None:
        """Make a registered adapter resident, evicting others. `can_admit` holds. Raises AdapterUnavailable.

        It is there for the steps that begin after it; the copy itself may still be under way.
        """
        if key in self._resident:
            self._tiles.touch(key)
            return
        started = time.perf_counter()
        source = self._sources[key]
        packed = self._loader.get(key, source)
        victims = self._tiles.victims(source.tiles_needed)
        assert victims is not None, "load follows can_admit"
        for victim in victims:
            self._release(victim)
        self.evictions += len(victims)
        tiles = self._tiles.acquire(key, source.tiles_needed)
        scales = self._scales[tiles[0]]
        is_read = max(self._read_in[tile] for tile in tiles) >= self._step > 0
        # A tile's end past its group's numbers is read by nobody.
        sizes = [
            self._layout.group_elements(self._layout.group(group))
            for group, count in source.num_tiles.items()
            for _ in range(count)
        ]
        pairs = [
            (self._memory[tile, :size], host.memory[:size])
            for tile, host, size in zip(tiles, packed, sizes, strict=True)
        ]
        fence = self._copier.copy([*pairs, (scales, packed[0].scales)], self._copier.mark() if is_read else None)
        for host in packed:
            host.read_by = fence
        self._loader.put_back(key, packed)
        self._arriving[key] = fence
        taken = iter(tiles)
        by_group = {group: tuple(itertools.islice(taken, count)) for group, count in source.num_tiles.items()}
        self._resident[key] = AdapterTiles(next(self._load_ids), by_group, scales, source.site_masks)
        self.loads += 1
        self.load_s += time.perf_counter() - started

    def _release(self, key: AdapterKey) -> None:
        adapter = self._resident.pop(key)
        used_in = self._used_in.pop(key, 0)
        for tiles in adapter.tiles.values():
            for tile in tiles:
                self._read_in[tile] = used_in
        self._arriving.pop(key, None)  # copies follow each other, so the next owner's comes after it
        self._tiles.release(key)

    def pin(self, key: AdapterKey) -> None:
        """Keep a resident adapter until as many `unpin`s."""
        self._tiles.pin(key)

    def unpin(self, key: AdapterKey) -> None:
        self._tiles.unpin(key)

    def set_paths(self, paths: Mapping[AdapterKey, Path]) -> None:
        """Where adapters lie that `set_upcoming` may name before they are registered; replaces what was known."""
        self._paths = dict(paths)

    def set_upcoming(self, keys: Sequence[AdapterKey]) -> None:
        """The adapters that are used next, nearest first; replaces what was known."""
        self._tiles.set_upcoming(keys)
        if self._loader.is_ahead:
            self._loader.set_line([item for key in keys if key not in self._resident for item in self._wanted(key)])

    def _wanted(self, key: AdapterKey) -> list[Wanted]:
        source = self._sources.get(key)
        if source is not None:
            return [Wanted(key, source.path, source)]
        return [Wanted(key, self._paths[key], None)] if key in self._paths else []

    def resident(self) -> list[AdapterKey]:
        return list(self._resident)

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

    def close(self) -> None:
        """End the threads that read ahead. May be called twice."""
        self._loader.close()

    def check_integrity(self) -> None:
        """Raises AssertionError unless tiles, residents and host copies agree."""
        self._tiles.check_integrity()
        self._loader.check_integrity()
        if isinstance(self.lora, StagedLora):
            self.lora.stage.check_integrity()
        assert set(self._resident) == set(self._tiles.owners()), "residents and tile owners differ"
        assert set(self._resident) <= set(self._sources), "a resident adapter is not registered"
        assert set(self._arriving) <= set(self._resident), "a copy arrives for nobody"
        for key, adapter in self._resident.items():
            counts = {group: len(tiles) for group, tiles in adapter.tiles.items()}
            assert counts == self._sources[key].num_tiles, "an adapter's tiles are not what its header asks"
