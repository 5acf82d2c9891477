"""Adapters on their way from disk through host memory into device tiles.

Joins who knows: `tiles` decides who holds which, `adapter_loader` reads, `adapter_memory` is the device's side; where
several ranks share the model, the others are told each decision. It does not know requests: pins and what comes next
are told.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from medley.spec.base_models import BaseModel
from medley_worker.engine.adapter_files import AdapterSource, AdapterUnavailable
from medley_worker.engine.adapter_loader import AdapterLoader, Wanted
from medley_worker.engine.adapter_memory import AdapterMemory, Lora, layout_for
from medley_worker.engine.copies import Copier, new_copier
from medley_worker.engine.host_tiles import PackedAdapter
from medley_worker.engine.sequences import AdapterKey
from medley_worker.engine.sizing import CPU_HOST_BYTES
from medley_worker.engine.tiles import TilePool
from medley_worker.models.sharding import Shard, shard_of
from medley_worker.ops.memory import Memory, PlainMemory

__all__ = ["AdapterCache", "AdapterKey", "AdapterTooLarge", "AdapterUnavailable", "OtherRanks"]


class AdapterTooLarge(Exception):
    """An adapter that needs more tiles than there are in all."""

    def __init__(self, key: AdapterKey, got: int, wanted: int) -> None:
        self.got, self.wanted = got, wanted
        super().__init__(f"adapter {key[1]} needs {got} tiles, the engine has {wanted}; raise its adapter memory")


class OtherRanks(Protocol):
    """The other ranks' adapters: each rank packs its share of the same files, into the tiles that this one chose.

    Numbers stand for adapters, a new one for each time that one becomes known.
    """

    def fetch(self, number: int, path: Path) -> None:
        """Have every rank pack its share; `fetched` is the answer."""
        ...

    def fetched(self, number: int) -> str | None:
        """Wait until every rank has; or why one could not."""
        ...

    def unfetch(self, number: int) -> None:
        """What was fetched is not going to be placed."""
        ...

    def place(self, number: int, load_id: int, tiles: Sequence[int]) -> None:
        """What was fetched goes into these tiles, for the steps that begin after it."""
        ...

    def release(self, number: int) -> None:
        """The adapter's tiles are to be another's."""
        ...

    def drop(self, number: int) -> None:
        """Nothing of the adapter is to stay, in host memory either."""
        ...

    def set_line(self, line: Sequence[tuple[int, Path]]) -> None:
        """Which adapters come next, nearest first."""
        ...


class AdapterCache:
    """Resident adapters: registered by key, loaded into tiles, pinned while rows use them, evicted by next use."""

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
        shard: Shard | None = None,
        others: OtherRanks | None = None,
        memory: Memory | None = None,
    ) -> None:
        """max_tokens, max_adapters: of one step. copier: for tests; the device has its own.

        shard: what of `model` this rank has, all of it by default; others: the ranks that have the rest. memory: where
        tiles and workspaces lie on the device; None: torch's own.
        """
        device = torch.device(device)
        copier = new_copier(device) if copier is None else copier
        shard = shard_of(model) if shard is None else shard
        layout = layout_for(shard.part, device)
        self._loader = AdapterLoader(shard, layout, dtype, copier, host_bytes)
        self._memory = AdapterMemory(
            layout,
            copier,
            memory=PlainMemory(device) if memory is None else memory,
            num_tiles=num_tiles,
            dtype=dtype,
            max_tokens=max_tokens,
            max_adapters=max_adapters,
        )
        self._others = others
        self._tiles: TilePool[AdapterKey] = TilePool(num_tiles)
        self._sources: dict[AdapterKey, AdapterSource] = {}
        self._paths: dict[AdapterKey, Path] = {}  # of adapters that come and are not registered
        self._numbers: dict[AdapterKey, int] = {}  # by which the other ranks know adapters
        self._next_number = itertools.count()
        self._load_ids = itertools.count()
        self.loads = 0
        self.evictions = 0
        self.load_s = 0.0

    @property
    def lora(self) -> Lora:
        return self._memory.lora

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
        self._drop_elsewhere(key)

    def evict_all(self) -> None:
        """Leave every tile, before the device's memory goes. Nobody has pinned any, and no step is under way.

        Host copies stay.
        """
        for key in self.resident():
            self._release(key)
        self._memory.forget_reads()

    def prune(self, is_wanted: Callable[[AdapterKey], bool]) -> None:
        """Unregister what is neither resident nor wanted. Host copies stay: what a key names never changes."""
        self._sources = {k: s for k, s in self._sources.items() if k in self._memory or is_wanted(k)}
        for key in self._numbers.keys() - self._sources.keys():
            self._drop_elsewhere(key)

    def is_registered(self, key: AdapterKey) -> bool:
        return key in self._sources

    def tiles_needed(self, key: AdapterKey) -> int:
        """Tiles that a registered adapter takes."""
        return self._sources[key].tiles_needed

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self._memory

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether `load` would not wait for a disk."""
        return key in self._memory or self._loader.is_ready(key)

    def wait(self, timeout_s: float) -> None:
        """Wait until one more of those that come is ready, at most `timeout_s`."""
        self._loader.wait(timeout_s)

    def can_admit(self, key: AdapterKey) -> bool:
        """Whether a registered adapter is resident, or fits into free tiles and those that nobody has pinned."""
        return key in self._memory or self._sources[key].tiles_needed <= self._tiles.num_available

    def load(self, key: AdapterKey) -> None:
        """Make a registered adapter resident, evicting others. `can_admit` holds. Raises AdapterUnavailable.

        It is there for the steps that begin after it; the copy itself may still be under way.
        """
        if key in self._memory:
            self._tiles.touch(key)
            return
        started = time.perf_counter()
        source = self._sources[key]
        packed = self._get(key, source)
        victims = self._tiles.victims(source.tiles_needed)
        assert victims is not None, "load follows can_admit"
        for victim in victims:
            self._release(victim)
        self.evictions += len(victims)
        tiles = self._tiles.acquire(key, source.tiles_needed)
        load_id = next(self._load_ids)
        self._memory.place(key, load_id, source, tiles, packed)
        if self._others is not None:
            self._others.place(self._number(key), load_id, tiles)
        self._loader.put_back(key, packed)
        self.loads += 1
        self.load_s += time.perf_counter() - started

    def _get(self, key: AdapterKey, source: AdapterSource) -> PackedAdapter:
        """The packed adapter, on every rank. Raises AdapterUnavailable where any of them cannot have it."""
        if self._others is None:
            return self._loader.get(key, source)
        number = self._number(key)
        self._others.fetch(number, source.path)  # they pack while this rank does
        try:
            packed = self._loader.get(key, source)
        except AdapterUnavailable:
            self._others.fetched(number)
            self._others.unfetch(number)
            raise
        reason = self._others.fetched(number)
        if reason is not None:
            self._others.unfetch(number)
            self._loader.put_back(key, packed)
            raise AdapterUnavailable(reason)
        return packed

    def _release(self, key: AdapterKey) -> None:
        self._memory.release(key)
        self._tiles.release(key)
        if self._others is not None:
            self._others.release(self._number(key))

    def _number(self, key: AdapterKey) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = next(self._next_number)
        return number

    def _drop_elsewhere(self, key: AdapterKey) -> None:
        number = self._numbers.pop(key, None)
        if number is not None and self._others is not None:
            self._others.drop(number)

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
            line = [item for key in keys if key not in self._memory for item in self._wanted(key)]
            self._loader.set_line(line)
            if self._others is not None:
                self._others.set_line([(self._number(item.key), item.path) for item in line])

    def _wanted(self, key: AdapterKey) -> list[Wanted]:
        source = self._sources.get(key)
        if source is not None:
            return [Wanted(key, source.path, source)]
        return [Wanted(key, self._paths[key], None)] if key in self._paths else []

    def resident(self) -> list[AdapterKey]:
        return self._memory.keys()

    def load_id(self, key: AdapterKey) -> int:
        """Of a resident adapter: by which the other ranks know what lies in its tiles."""
        return self._memory[key].load_id

    def lora_batch(
        self, keys: Sequence[AdapterKey | None], num_tokens: Sequence[int], *, begins_step: bool = True
    ) -> object | None:
        """The LoRA batch of a pass; see AdapterMemory."""
        return self._memory.lora_batch(keys, num_tokens, begins_step=begins_step)

    def close(self) -> None:
        """End the threads that read ahead. May be called twice."""
        self._loader.close()

    def check_integrity(self) -> None:
        """Raises AssertionError unless tiles, residents and host copies agree."""
        self._tiles.check_integrity()
        self._loader.check_integrity()
        self._memory.check_integrity()
        resident = set(self._memory.keys())
        assert resident == set(self._tiles.owners()), "residents and tile owners differ"
        assert resident <= set(self._sources), "a resident adapter is not registered"
        for key in resident:
            counts = {group: len(tiles) for group, tiles in self._memory[key].tiles.items()}
            assert counts == self._sources[key].num_tiles, "an adapter's tiles are not what its header asks"
