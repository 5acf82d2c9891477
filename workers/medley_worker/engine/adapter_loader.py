"""Adapters from disk into host memory: at once where steps may wait for it, else on threads ahead of need.

Owns the host copies and the threads. Knows no device memory and no requests: what comes next is told.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medley_worker.engine.adapter_files import AdapterSource, AdapterUnavailable, Layout, pack_adapter, read_source
from medley_worker.engine.copies import Copier
from medley_worker.engine.host_tiles import HostCopies, HostTiles, PackedAdapter
from medley_worker.engine.sequences import AdapterKey
from medley_worker.models.sharding import Shard
from medley_worker.ops.lora_stage import SITES

# Packing is bound by memory and by the interpreter; more threads would only take turns with the step loop.
NUM_THREADS = 3
# The step loop gives the interpreter up at each launch; Python's default lets a thread that reads a header, 8 ms of
# work, keep it for 5 ms, as long as a step.
SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter that comes; source is None where its header has not been read."""

    key: AdapterKey
    path: Path
    source: AdapterSource | None


class AdapterLoader:
    """Packed adapters by key. With a copier that is asynchronous, `is_ready` goes before `get`."""

    def __init__(self, shard: Shard, layout: Layout, dtype: torch.dtype, copier: Copier, limit_bytes: int) -> None:
        self._shard, self._layout, self._copier = shard, layout, copier
        self._growing = threading.Lock()  # taken before the other one
        self._tiles = HostTiles(copier, layout.tile_elements, dtype, (layout.num_layers, len(SITES)))
        # Everything below is the lock's, and what is free of the tiles.
        self._changed = threading.Condition()
        self._copies = HostCopies(self._tiles, limit_bytes)
        self._sources: dict[AdapterKey, AdapterSource] = {}  # headers read ahead
        self._failures: dict[AdapterKey, AdapterUnavailable] = {}
        self._line: dict[AdapterKey, Wanted] = {}  # nearest first
        self._kept: set[AdapterKey] = set()  # the part of the line that fits within the limit
        self._at_work: set[AdapterKey] = set()
        self._num_settled = 0  # pieces of work that have ended on threads
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    @property
    def is_ahead(self) -> bool:
        """Whether adapters are read ahead of need, so that nobody need wait for a disk."""
        return self._copier.is_async

    def source(self, key: AdapterKey, path: Path) -> AdapterSource:
        """An adapter's header, read now unless it was ahead of need. Raises AdapterUnavailable."""
        with self._changed:
            source = self._sources.pop(key, None)
            self._failures.pop(key, None)
        return read_source(path, self._shard.whole, self._layout) if source is None else source

    def set_line(self, wanted: Sequence[Wanted]) -> None:
        """Which adapters come next, nearest first; replaces what was known. Reading starts at once."""
        if not self.is_ahead:
            return
        with self._changed:
            self._line = {item.key: item for item in wanted}
            self._sources = {key: source for key, source in self._sources.items() if key in self._line}
            self._failures = {key: failure for key, failure in self._failures.items() if key in self._line}
            self._keep_nearest()
            if self._line and not self._threads:
                self._start_threads()
            self._changed.notify_all()

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether `get` answers, or raises, without waiting for a disk."""
        if not self.is_ahead:
            return True
        with self._changed:
            return key in self._copies or key in self._failures

    def get(self, key: AdapterKey, source: AdapterSource) -> PackedAdapter:
        """The packed adapter, the caller's until `put_back`. Raises AdapterUnavailable."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._at_work)
            if key in self._failures:
                raise self._failures.pop(key)
            packed = self._copies.take(key)
            self._at_work.add(key)
            if packed is not None:
                return packed
        try:
            tiles = self._allocate(source.tiles_needed)
            self._pack(source, tiles)
        except BaseException:
            with self._changed:
                self._at_work.remove(key)
            raise
        return tiles

    def put_back(self, key: AdapterKey, packed: PackedAdapter) -> None:
        """Copies out of `packed` have been started and fenced: keep it if there is room."""
        with self._changed:
            self._at_work.remove(key)
            self._keep(key, packed)

    def drop(self, key: AdapterKey) -> None:
        """Forget a copy, and that it could not be made. Waits for a thread that is at it."""
        with self._changed:
            self._line.pop(key, None)
            self._changed.wait_for(lambda: key not in self._at_work)
            self._copies.drop(key)
            self._sources.pop(key, None)
            self._failures.pop(key, None)
            self._keep_nearest()

    def wait(self, timeout_s: float) -> None:
        """Wait until one more adapter is ready, or `timeout_s` have passed; at once if none is on its way."""
        with self._changed:
            before = self._num_settled
            if self._at_work or self._next() is not None:
                self._changed.wait_for(lambda: self._num_settled != before, timeout_s)

    def close(self) -> None:
        """End the threads. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def check_integrity(self) -> None:
        with self._changed:
            self._copies.check_integrity()

    def _keep_nearest(self) -> None:
        """The nearest of the line, as many as the limit holds; the first one whatever it takes."""
        self._kept = set()
        num_bytes = 0
        for item in self._line.values():
            source = item.source or self._sources.get(item.key)
            num_bytes += 0 if source is None else source.tiles_needed * self._tiles.tile_bytes
            if self._kept and num_bytes > self._copies.limit_bytes:
                return
            self._kept.add(item.key)

    def _start_threads(self) -> None:
        assert not self._is_closed, "the loader is closed"
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        for number in range(NUM_THREADS):
            thread = threading.Thread(target=self._work, name=f"adapters-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _next(self) -> Wanted | None:
        """The nearest adapter that nobody reads yet."""
        for key, item in self._line.items():
            if key not in self._kept:
                return None
            if key not in self._copies and key not in self._failures and key not in self._at_work:
                return item
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._next() is not None)
                if self._is_closed:
                    return
                item = self._next()
                assert item is not None
                self._at_work.add(item.key)
                source = item.source or self._sources.get(item.key)
            self._settle(item, self._header(item) if source is None else self._packer(item.key, source))

    def _settle(self, item: Wanted, work: Callable[[], None]) -> None:
        """Do `work`; its failure is the adapter's."""
        failure: AdapterUnavailable | None = None
        try:
            work()
        except AdapterUnavailable as error:
            failure = error
        except Exception as error:
            # Lost on this thread, it would leave the adapter's jobs waiting for ever.
            failure = AdapterUnavailable(f"{item.path} could not be loaded: {type(error).__name__}: {error}")
        with self._changed:
            self._at_work.remove(item.key)
            self._num_settled += 1
            if failure is not None and item.key in self._line:
                self._failures[item.key] = failure
            self._changed.notify_all()

    def _header(self, item: Wanted) -> Callable[[], None]:
        def work() -> None:
            source = read_source(item.path, self._shard.whole, self._layout)
            with self._changed:
                self._sources[item.key] = source
                self._keep_nearest()

        return work

    def _packer(self, key: AdapterKey, source: AdapterSource) -> Callable[[], None]:
        def work() -> None:
            with self._changed:
                self._copies.make_room(source.tiles_needed * self._tiles.tile_bytes, self._kept)
            tiles = self._allocate(source.tiles_needed)
            self._pack(source, tiles)
            with self._changed:
                self._keep(key, tiles)

        return work

    def _allocate(self, count: int) -> PackedAdapter:
        """Host tiles, of new memory where there are too few. That takes long, and steps ask `is_ready` meanwhile."""
        with self._growing:
            while True:
                with self._changed:
                    if self._tiles.num_free >= count:
                        return self._tiles.allocate(count)
                new = self._tiles.new_tiles()
                with self._changed:
                    self._tiles.free(new)

    def _keep(self, key: AdapterKey, packed: PackedAdapter) -> None:
        """Keep it if there is room. What is kept is needed next, even where others' copies are in the way now."""
        num_bytes = len(packed) * self._tiles.tile_bytes
        is_small = num_bytes <= self._copies.limit_bytes  # what can never fit drops nothing
        has_room = (is_small or key in self._kept) and self._copies.make_room(num_bytes, self._kept)
        if has_room or key in self._kept:
            self._copies.put(key, packed)
        else:
            self._tiles.free(packed)

    def _pack(self, source: AdapterSource, tiles: PackedAdapter) -> None:
        """Fill `tiles`; on failure they are free again."""
        try:
            for tile in tiles:
                if tile.read_by is not None:
                    tile.read_by.wait()
                    tile.read_by = None
            pack_adapter(source, self._shard, self._layout, [tile.memory for tile in tiles], tiles[0].scales)
        except BaseException:
            with self._changed:
                self._tiles.free(tiles)
            raise
