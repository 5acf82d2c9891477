"""Adapters on their way from disk through host memory into device tiles.

Owns the memory of tiles and what lies in it; `tiles` decides who holds which, `adapter_files` reads. It does not
know requests: pins and what comes next are told.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley.spec.peft_config import MAX_RANK
from medley_worker.engine.adapter_files import (
    AdapterSource,
    AdapterUnavailable,
    HostCopies,
    PackedAdapter,
    pack_adapter,
    read_source,
)
from medley_worker.engine.sequences import AdapterKey
from medley_worker.engine.tiles import TilePool
from medley_worker.ops.lora import LoraBatch, build_lora_batch
from medley_worker.ops.lora_stage import TILE_RANKS, AdapterTiles, LoraStage, tile_layout

__all__ = ["AdapterCache", "AdapterKey", "AdapterTooLarge", "AdapterUnavailable", "tiles_for"]

DEFAULT_ADAPTER_BYTES = 256 << 20
HOST_BYTES = 1 << 30


class AdapterTooLarge(Exception):
    """An adapter that needs more tiles than there are in all."""

    def __init__(self, key: AdapterKey, got: int, wanted: int) -> None:
        self.got, self.wanted = got, wanted
        super().__init__(f"adapter {key[1]} needs {got} tiles, the engine has {wanted}; raise its adapter memory")


def tiles_for(
    model: BaseModel, *, dtype: torch.dtype, adapter_slots: int | None = None, adapter_bytes: int | None = None
) -> int:
    """How many tiles an engine gets.

    adapter_slots: room for so many adapters of the largest rank, 128, on all sites.
    adapter_bytes: what fits into so many bytes, exactly. Neither: 256 MiB, and one of rank 128 at the least.
    Raises ValueError, naming the field, for less than 0 and for both.
    """
    if adapter_slots is not None and adapter_bytes is not None:
        raise ValueError("adapter_slots and adapter_bytes: got both, wanted one of them")
    for name, value in (("adapter_slots", adapter_slots), ("adapter_bytes", adapter_bytes)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: got {value}, wanted 0 or more")
    layout = tile_layout(model)
    tile_bytes = layout.tile_elements * dtype.itemsize
    largest = len(layout.groups) * MAX_RANK // TILE_RANKS
    if adapter_slots is not None:
        return adapter_slots * largest
    if adapter_bytes is not None:
        return adapter_bytes // tile_bytes
    return max(largest, DEFAULT_ADAPTER_BYTES // tile_bytes)


class AdapterCache:
    """Resident adapters: registered by key, loaded into tiles, pinned while rows use them, evicted by next use."""

    def __init__(
        self,
        model: BaseModel,
        *,
        num_tiles: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        host_bytes: int = HOST_BYTES,
    ) -> None:
        self._model, self._dtype = model, dtype
        self._layout = tile_layout(model)
        self._device = torch.device(device)
        self._memory = _new_tiles(num_tiles + 1, self._layout.tile_elements, dtype, self._device)
        self._stage = LoraStage(self._layout, self._memory)
        self._tiles: TilePool[AdapterKey] = TilePool(num_tiles)
        self._sources: dict[AdapterKey, AdapterSource] = {}
        self._resident: dict[AdapterKey, AdapterTiles] = {}
        self._host = HostCopies(host_bytes)
        self._load_ids = itertools.count()
        self._last_batch: tuple[tuple[object, ...], LoraBatch | None] = ((), None)
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

    def register(self, key: AdapterKey, path: Path | str) -> None:
        """Make an adapter known. A known key is left as it is: what a key names never changes.

        Raises AdapterUnavailable (unreadable, or not an adapter of this base), AdapterTooLarge.
        """
        if key in self._sources:
            return
        source = read_source(Path(path), self._model, self._layout)
        if source.tiles_needed > self.num_tiles:
            raise AdapterTooLarge(key, source.tiles_needed, self.num_tiles)
        self._sources[key] = source

    def forget(self, key: AdapterKey) -> None:
        """Drop an adapter from everywhere. It must not be pinned. Unknown keys are ignored."""
        if key in self._tiles:
            self._release(key)
        self._host.drop(key)
        self._sources.pop(key, None)

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

    def can_admit(self, key: AdapterKey) -> bool:
        """Whether a registered adapter is resident, or fits into free tiles and those that nobody has pinned."""
        return key in self._resident or self._sources[key].tiles_needed <= self._tiles.num_available

    def load(self, key: AdapterKey) -> None:
        """Make a registered adapter resident, evicting others. `can_admit` holds. Raises AdapterUnavailable."""
        if key in self._resident:
            self._tiles.touch(key)
            return
        started = time.perf_counter()
        source = self._sources[key]
        packed = self._packed(key, source)
        victims = self._tiles.victims(source.tiles_needed)
        assert victims is not None, "load follows can_admit"
        for victim in victims:
            self._release(victim)
        self.evictions += len(victims)
        tiles = self._tiles.acquire(key, source.tiles_needed)
        self._memory.index_copy_(0, torch.tensor(tiles, device=self._device), packed.tiles.to(self._device))
        taken = iter(tiles)
        by_group = {group: tuple(itertools.islice(taken, count)) for group, count in source.num_tiles.items()}
        self._resident[key] = AdapterTiles(next(self._load_ids), by_group, packed.scales.to(self._device))
        self.loads += 1
        self.load_s += time.perf_counter() - started

    def _packed(self, key: AdapterKey, source: AdapterSource) -> PackedAdapter:
        packed = self._host.get(key)
        if packed is None:
            packed = pack_adapter(source, self._layout, self._dtype)
            self._host.put(key, packed)
        return packed

    def _release(self, key: AdapterKey) -> None:
        self._tiles.release(key)
        del self._resident[key]

    def pin(self, key: AdapterKey) -> None:
        """Keep a resident adapter until as many `unpin`s."""
        self._tiles.pin(key)

    def unpin(self, key: AdapterKey) -> None:
        self._tiles.unpin(key)

    def set_upcoming(self, keys: Sequence[AdapterKey]) -> None:
        """The adapters that are used next, nearest first; replaces what was known."""
        self._tiles.set_upcoming(keys)

    def resident(self) -> list[AdapterKey]:
        return list(self._resident)

    def lora_batch(self, keys: Sequence[AdapterKey | None], num_tokens: Sequence[int]) -> LoraBatch | None:
        """The LoraBatch of a step: one resident key (None: the base) and number of new tokens a sequence, in order.

        None where no row has an adapter. Valid until the next call. A step like the last one gets the same batch.
        """
        adapters = [None if key is None else self._resident[key] for key in keys]
        composition = (*(None if a is None else a.load_id for a in adapters), *num_tokens)
        if self._last_batch[0] != composition:
            self._last_batch = (composition, build_lora_batch(adapters, num_tokens, self._stage))
        return self._last_batch[1]

    def check_integrity(self) -> None:
        """Raises AssertionError unless tiles, residents and host copies agree."""
        self._tiles.check_integrity()
        self._host.check_integrity()
        self._stage.check_integrity()
        assert set(self._resident) == set(self._tiles.owners()), "residents and tile owners differ"
        assert set(self._resident) <= set(self._sources), "a resident adapter is not registered"
        for key, adapter in self._resident.items():
            counts = {group: len(tiles) for group, tiles in adapter.tiles.items()}
            assert counts == self._sources[key].num_tiles, "an adapter's tiles are not what its header asks"


def _new_tiles(count: int, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, elements] zeros. On CPU from calloc, so that tiles never used take no memory."""
    if device.type != "cpu":
        return torch.zeros((count, elements), dtype=dtype, device=device)
    memory = np.zeros(count * elements * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(count, elements)
