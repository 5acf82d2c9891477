"""Puts an engine's parts together: reads the model, sizes and allocates memory. Knows no requests."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch

from medley.spec.base_models import BaseModel, read_base_model
from medley.spec.peft_config import MAX_RANK
from medley.spec.wire import EngineConfig
from medley_worker.engine.adapter_memory import layout_for
from medley_worker.engine.adapter_names import AdapterNames
from medley_worker.engine.adapters import AdapterCache
from medley_worker.engine.forward import Forward, NullForward
from medley_worker.engine.pacing import Pace
from medley_worker.engine.pages import PagePool
from medley_worker.engine.parallel.followers import Followers, RankDied, rank_device
from medley_worker.engine.parallel.memory import RanksMemory
from medley_worker.engine.residency import CachedResidency
from medley_worker.engine.rows import RowTable
from medley_worker.engine.runner import ModelForward
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import Sequence
from medley_worker.engine.sizing import DeviceMemory, EngineSizes, Shape, host_copy_bytes, size_engine
from medley_worker.models import Decoder, KVCache, load_model
from medley_worker.models.kv import kv_page_size
from medley_worker.models.sharding import shard_of
from medley_worker.ops.collectives import RankGroup
from medley_worker.ops.device_usage import DeviceUsage
from medley_worker.ops.lora_stage import TILE_RANKS
from medley_worker.ops.memory import Memory, Sleeper, new_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Parts:
    """What an Engine joins. One owner for each resource."""

    model: BaseModel
    sizes: EngineSizes
    rows: RowTable
    pages: PagePool
    residency: CachedResidency
    names: AdapterNames
    scheduler: Scheduler
    forward: Forward
    pace: Pace | None
    memory: Sleeper  # of all ranks
    usage: DeviceUsage  # of this rank
    ranks: Ranks | None  # where the model is shared


@dataclass(frozen=True, slots=True)
class Ranks:
    """The other ranks of the model, and this one's way to them within a pass."""

    followers: Followers
    group: RankGroup

    def close(self, forward: Forward) -> None:
        """End them. forward: this rank's, whose graphs go first."""
        release = getattr(forward, "close", None)
        if release is not None:
            release()
        self.followers.close()
        self.group.close()


def assemble(
    config: EngineConfig,
    announce: Callable[[Seq[Sequence]], None],
    on_rank_death: Callable[[str], None] | None = None,
) -> Parts:
    """Build everything that `config` asks for. announce: see CachedResidency; on_rank_death: see Followers.

    Raises UnsupportedModel, or ValueError naming the field of `config` that is wrong.
    """
    _check(config)
    if config.tensor_parallel == 1:
        return _assemble(config, announce, None)
    shard_of(read_base_model(Path(config.model_dir), need_weights=False), size=config.tensor_parallel)
    followers = Followers(config, on_rank_death)
    try:
        return _assemble(config, announce, followers)
    except BaseException:
        followers.close()
        raise


def _check(config: EngineConfig) -> None:
    """What does not hang on the model. Raises ValueError naming the field."""
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: got {config.dtype!r}, wanted one of {', '.join(DTYPES)}")
    if config.forward not in ("model", "null"):
        raise ValueError(f"forward: got {config.forward!r}, wanted model or null")
    kind = config.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: got {config.device!r}, wanted cpu, cuda or cuda:<n>")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {config.device!r}, but torch finds no CUDA device here; wanted cpu")
    size = config.tensor_parallel
    if size < 1:
        raise ValueError(f"tensor_parallel: got {size}, wanted 1 or more")
    if size == 1:
        return
    if config.forward == "null":
        raise ValueError(f"tensor_parallel: got {size} with forward null, wanted 1: there is no model to share")
    if kind == "cuda":
        check_devices(config)


def check_devices(config: EngineConfig) -> None:
    """Whether each rank has a CUDA device. Raises ValueError."""
    size, index = config.tensor_parallel, config.device.partition(":")[2]
    left = torch.cuda.device_count() - int(index or 0)
    if size > left:
        raise ValueError(
            f"tensor_parallel: got {size}, wanted at most {left}: the CUDA devices here from {config.device!r} on"
        )


def _assemble(config: EngineConfig, announce: Callable[[Seq[Sequence]], None], followers: Followers | None) -> Parts:
    dtype = DTYPES[config.dtype]
    device = torch.device(config.device if followers is None else rank_device(config, 0))
    usage = DeviceUsage(device)  # first of all
    memory = new_memory(device, sleeps=config.sleeps)
    decoder: Decoder | None = None
    if config.forward == "null":
        model = read_base_model(Path(config.model_dir), need_weights=False)
    else:
        decoder = load_model(
            config.model_dir,
            device=device,
            dtype=dtype,
            load_format=config.load_format,
            seed=config.seed,
            num_ranks=config.tensor_parallel,
            memory=memory,
        )
        model = decoder.shard.whole
    part = model if decoder is None else decoder.config
    ranks = None if followers is None or decoder is None else _meet(followers, decoder)
    sizes = size_engine(config, part, _shape(part, dtype, device), _least_memory(device, memory, ranks))
    host_bytes = host_copy_bytes(config, free_host_bytes())
    if followers is not None:
        followers.build(sizes, host_bytes)
    cache = AdapterCache(
        model,
        num_tiles=sizes.num_tiles,
        dtype=dtype,
        device=device,
        host_bytes=host_bytes,
        max_tokens=sizes.max_num_batched_tokens + sizes.max_num_seqs,  # decode rows are padded to a bucket
        max_adapters=sizes.max_num_seqs,
        shard=None if decoder is None else decoder.shard,
        others=followers,
        memory=memory,
    )
    rows = RowTable(sizes.max_num_seqs, sizes.max_model_len, sizes.page_size, model.eos_token_ids)
    pages = PagePool(sizes.num_pages, sizes.page_size)
    residency = CachedResidency(cache, announce)
    pace = None if config.max_tpot_ms is None else Pace(config.max_tpot_ms, sizes.max_num_seqs)
    scheduler = Scheduler(rows, pages, residency, max_tokens=sizes.max_num_batched_tokens, pace=pace)
    forward: Forward
    if decoder is None:
        forward = NullForward(rows, model.vocab_size)
    else:
        kv = decoder.new_kv_cache(sizes.num_pages, memory=memory)
        forward = _forward(decoder, kv, cache, rows, scheduler, sizes, config.batch_invariant, followers, memory)
    if followers is not None:
        followers.await_built()
    usage.settle(memory)
    sleeper = memory if followers is None else RanksMemory(memory, followers)
    names = AdapterNames(residency, model)
    return Parts(model, sizes, rows, pages, residency, names, scheduler, forward, pace, sleeper, usage, ranks)


def _meet(followers: Followers, decoder: Decoder) -> Ranks:
    """Connect all ranks, whose weights are loaded. Raises RankDied, OSError where they cannot reach each other."""
    followers.await_loaded()
    try:
        with followers.watched():
            group = RankGroup(followers.meeting, 0, decoder.shard.size, decoder.device)
    except RankDied:
        raise
    except RuntimeError as error:
        raise OSError(
            f"tensor_parallel: the model's {decoder.shard.size} ranks cannot be connected: {error}"
        ) from error
    decoder.join(group)
    return Ranks(followers, group)


def _least_memory(device: torch.device, memory: Memory, ranks: Ranks | None) -> DeviceMemory | None:
    """The memory of the rank that has least: all ranks have the same pages and tiles."""
    mine = device_memory(device, memory)
    others = [] if ranks is None else ranks.followers.await_met(ranks.group)
    return mine if mine is None else min([mine, *others], key=lambda memory: memory.free_bytes)


def _forward(
    decoder: Decoder,
    kv: KVCache,
    cache: AdapterCache,
    rows: RowTable,
    scheduler: Scheduler,
    sizes: EngineSizes,
    is_invariant: bool,
    others: Followers | None,
    memory: Memory,
) -> Forward:
    if decoder.device.type == "cuda":
        # FlashInfer is installed where there is CUDA.
        from medley_worker.engine.cuda_forward import CudaForward

        return CudaForward(
            decoder,
            kv,
            cache,
            rows,
            scheduler,
            max_tokens=sizes.max_num_batched_tokens,
            is_invariant=is_invariant,
            others=others,
            memory=memory,
        )
    return ModelForward(decoder, kv, cache, rows, scheduler, others)


def _shape(model: BaseModel, dtype: torch.dtype, device: torch.device) -> Shape:
    layout = layout_for(model, device)
    page_size = kv_page_size(device)
    return Shape(
        dtype_bytes=dtype.itemsize,
        page_bytes=KVCache.page_bytes(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            page_size=page_size,
        ),
        page_size=page_size,
        tile_bytes=layout.tile_elements * dtype.itemsize,
        adapter_tiles=len(layout.groups) * MAX_RANK // TILE_RANKS,
    )


def device_memory(device: torch.device, memory: Memory) -> DeviceMemory | None:
    """What the weights have left of a CUDA device."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what loading the weights took for a moment
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_allocated(device) + memory.num_bytes
    return DeviceMemory(free_bytes=free, weight_bytes=weights, total_bytes=total)


def free_host_bytes() -> int:
    """Memory that the machine has free, pages of files not counted."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
