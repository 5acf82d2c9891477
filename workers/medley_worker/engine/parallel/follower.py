"""One rank that follows: its share of the weights, cache and adapters, and the passes that rank 0 tells it to run.

It decides nothing and sees no token: rows come to it embedded, and what its layers bring goes into the ranks' sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from medley_worker.engine.adapter_files import AdapterSource, AdapterUnavailable
from medley_worker.engine.adapter_loader import AdapterLoader, Wanted
from medley_worker.engine.adapter_memory import AdapterMemory, layout_for
from medley_worker.engine.assembly import DTYPES, device_memory
from medley_worker.engine.copies import new_copier
from medley_worker.engine.host_tiles import PackedAdapter
from medley_worker.engine.parallel.followers import rank_device
from medley_worker.engine.parallel.messages import (
    Built,
    Drop,
    Fetch,
    Fetched,
    Line,
    Pass,
    PassArrays,
    Place,
    Slept,
    Start,
    Vacate,
    Woken,
)
from medley_worker.engine.sequences import AdapterKey
from medley_worker.engine.sizing import DeviceMemory, EngineSizes
from medley_worker.models import Decoder, KVCache, build_batch, load_model
from medley_worker.ops.collectives import RankGroup
from medley_worker.ops.device_usage import DeviceUsage
from medley_worker.ops.lora import LoraBatch
from medley_worker.ops.memory import new_memory

MAX_SOURCES = 2048  # headers kept; one takes some 50 KB


class Passes(Protocol):
    """Runs passes on the rank's device."""

    def run(self, num_decode_rows: int, arrays: PassArrays, lora: object | None) -> None:
        """Launch one; returns before it is done."""
        ...


class CpuPasses:
    """Of a Decoder's share on CPU."""

    def __init__(self, decoder: Decoder, kv: KVCache) -> None:
        self._decoder, self._kv = decoder, kv

    def run(self, num_decode_rows: int, arrays: PassArrays, lora: object | None) -> None:
        assert lora is None or isinstance(lora, LoraBatch)
        num_pages = -(-arrays.kv_len // self._kv.page_size)
        page_table = np.zeros((len(num_pages), int(num_pages.max())), np.int32)
        page_table[np.arange(page_table.shape[1]) < num_pages[:, None]] = arrays.kv_indices
        ends = np.concatenate([[0], np.cumsum(arrays.num_new)])
        batch = build_batch(
            token_ids=np.zeros(int(ends[-1]), np.int64),
            qo_indptr=ends,
            kv_len=arrays.kv_len,
            page_table=page_table,
            num_decode_rows=num_decode_rows,
            logit_rows=np.zeros(0, np.int64),
            page_size=self._kv.page_size,
            lora=lora,
            device=self._decoder.device,
        )
        self._decoder.trunk(batch, self._kv)


class Follower:
    """Built in the order load, `meet`, `build`; then `fetch` on the thread that reads, all else on one other."""

    def __init__(self, start: Start) -> None:
        """Load this rank's weights. Raises UnsupportedModel, ValueError, OSError."""
        config = self._config = start.config
        self._start = start
        self._device = torch.device(rank_device(config, start.rank))
        self._usage = DeviceUsage(self._device)  # first of all
        self._is_asleep = False
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._memory = new_memory(self._device, sleeps=config.sleeps)
        self._decoder = load_model(
            config.model_dir,
            device=self._device,
            dtype=DTYPES[config.dtype],
            load_format=config.load_format,
            seed=config.seed,
            rank=start.rank,
            num_ranks=config.tensor_parallel,
            memory=self._memory,
        )

    def meet(self) -> DeviceMemory | None:
        """Connect to the other ranks. What is left of the device's memory then."""
        start, size = self._start, self._config.tensor_parallel
        self._decoder.join(RankGroup(Path(start.meeting), start.rank, size, self._device))
        return device_memory(self._device, self._memory)

    def build(self, sizes: EngineSizes, host_bytes: int) -> Built:
        """Allocate and warm up, as rank 0 does at the same time."""
        decoder = self._decoder
        layout, copier = layout_for(decoder.config, self._device), new_copier(self._device)
        self._loader = AdapterLoader(decoder.shard, layout, decoder.dtype, copier, host_bytes)
        self._adapters = AdapterMemory(
            layout,
            copier,
            memory=self._memory,
            num_tiles=sizes.num_tiles,
            dtype=decoder.dtype,
            max_tokens=sizes.max_num_batched_tokens + sizes.max_num_seqs,
            max_adapters=sizes.max_num_seqs,
        )
        self._sources: dict[int, AdapterSource] = {}  # filled by the reading thread
        self._fetched: dict[int, tuple[AdapterSource, PackedAdapter]] = {}
        self._keys: dict[int, AdapterKey] = {}  # by load_id
        kv = decoder.new_kv_cache(sizes.num_pages, memory=self._memory)
        self._passes = self._new_passes(kv, sizes)
        self._usage.settle(self._memory)
        return Built(self._memory.can_sleep, self._usage.num_bytes)

    def _new_passes(self, kv: KVCache, sizes: EngineSizes) -> Passes:
        if self._device.type != "cuda":
            return CpuPasses(self._decoder, kv)
        from medley_worker.engine.cuda_passes import CudaFollowerPasses

        return CudaFollowerPasses(
            self._decoder,
            kv,
            self._adapters,
            self._memory,
            num_rows=sizes.max_num_seqs,
            max_row_pages=-(-sizes.max_model_len // sizes.page_size),
            max_tokens=sizes.max_num_batched_tokens,
            is_invariant=self._config.batch_invariant,
        )

    def fetch(self, message: Fetch) -> Fetched:
        """Pack an adapter, which waits in host memory for `place`."""
        key, path = _key(message.number), Path(message.path)
        try:
            source = self._sources.get(message.number) or self._loader.source(key, path)
            if len(self._sources) >= MAX_SOURCES:
                self._sources.clear()
            self._sources[message.number] = source
            self._fetched[message.number] = (source, self._loader.get(key, source))
        except AdapterUnavailable as error:
            return Fetched(message.number, f"{error} (rank {self._start.rank})")
        return Fetched(message.number, None)

    def set_line(self, message: Line) -> None:
        """Start to read what comes next."""
        wanted = [Wanted(_key(number), Path(path), self._sources.get(number)) for number, path in message.adapters]
        self._loader.set_line([item for item in wanted if item.key not in self._adapters])

    def unfetch(self, number: int) -> None:
        fetched = self._fetched.pop(number, None)
        if fetched is not None:
            self._loader.put_back(_key(number), fetched[1])

    def place(self, message: Place) -> None:
        key = _key(message.number)
        source, packed = self._fetched.pop(message.number)
        self._adapters.place(key, message.load_id, source, message.tiles, packed)
        self._loader.put_back(key, packed)
        self._keys[message.load_id] = key

    def vacate(self, message: Vacate) -> None:
        key = _key(message.number)
        del self._keys[self._adapters[key].load_id]
        self._adapters.release(key)

    def drop(self, message: Drop) -> None:
        self._loader.drop(_key(message.number))
        self._sources.pop(message.number, None)  # no `fetch` names it any more

    def sleep(self) -> Slept:
        """Give the device's memory back, which adapters have left. Graphs stay, and the ranks' group in them."""
        error: str | None = None
        if not self._is_asleep:
            self._adapters.forget_reads()
            error = self._failure_of(self._memory.sleep)
            self._is_asleep = error is None
        return Slept(error, self._usage.num_bytes)

    def wake(self) -> Woken:
        error: str | None = None
        if self._is_asleep:
            error = self._failure_of(self._memory.wake)
            self._is_asleep = error is not None
        return Woken(error, self._usage.num_bytes)

    def _failure_of(self, change: Callable[[], None]) -> str | None:
        try:
            change()
        except (RuntimeError, OSError, MemoryError) as error:
            return f"{error} (rank {self._start.rank})"
        return None

    @torch.inference_mode()
    def run(self, message: Pass) -> None:
        arrays = PassArrays.of(message)
        keys = self._keys_of(message.load_ids)
        lora = self._adapters.lora_batch(keys, arrays.num_new.tolist(), begins_step=message.begins_step)
        self._passes.run(message.num_decode_rows, arrays, lora)

    def _keys_of(self, load_ids: Sequence[int | None]) -> list[AdapterKey | None]:
        return [None if load_id is None else self._keys[load_id] for load_id in load_ids]


def _key(number: int) -> AdapterKey:
    return ("rank 0", str(number))
