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
from medley_worker.engine.adapters import AdapterCache, layout_for
from medley_worker.engine.forward import Forward, NullForward
from medley_worker.engine.pacing import Pace
from medley_worker.engine.pages import PagePool
from medley_worker.engine.residency import CachedResidency
from medley_worker.engine.rows import RowTable
from medley_worker.engine.runner import ModelForward
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import Sequence
from medley_worker.engine.sizing import DeviceMemory, EngineSizes, Shape, host_copy_bytes, size_engine
from medley_worker.models import Decoder, KVCache, load_model
from medley_worker.models.kv import kv_page_size
from medley_worker.ops.device_usage import DeviceUsage
from medley_worker.ops.lora_stage import TILE_RANKS
from medley_worker.ops.memory import Memory, new_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Parts:
    """What an Engine joins. One owner for each resource."""

    model: BaseModel
    sizes: EngineSizes
    rows: RowTable
    pages: PagePool
    residency: CachedResidency
    scheduler: Scheduler
    forward: Forward
    pace: Pace | None
    memory: Memory
    usage: DeviceUsage


def assemble(config: EngineConfig, announce: Callable[[Seq[Sequence]], None]) -> Parts:
    """Build everything that `config` asks for. announce: see CachedResidency.

    Raises UnsupportedModel, or ValueError naming the field of `config` that is wrong.
    """
    dtype = DTYPES.get(config.dtype)
    if dtype is None:
        raise ValueError(f"dtype: got {config.dtype!r}, wanted one of {', '.join(DTYPES)}")
    if config.forward not in ("model", "null"):
        raise ValueError(f"forward: got {config.forward!r}, wanted model or null")
    if config.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: got {config.device!r}, wanted cpu, cuda or cuda:<n>")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {config.device!r}, but torch finds no CUDA device here; wanted cpu")
    device = torch.device(config.device)
    usage = DeviceUsage(device)  # first of all
    memory = new_memory(device, sleeps=config.sleeps)
    decoder: Decoder | None = None
    if config.forward == "null":
        model = read_base_model(Path(config.model_dir), need_weights=False)
    else:
        decoder = load_model(
            config.model_dir,
            device=config.device,
            dtype=dtype,
            load_format=config.load_format,
            seed=config.seed,
            memory=memory,
        )
        model = decoder.config
    sizes = size_engine(config, model, _shape(model, dtype, device), _memory(device, memory))
    cache = AdapterCache(
        model,
        num_tiles=sizes.num_tiles,
        dtype=dtype,
        device=device,
        host_bytes=host_copy_bytes(config, _free_host_bytes()),
        max_tokens=sizes.max_num_batched_tokens + sizes.max_num_seqs,  # decode rows are padded to a bucket
        max_adapters=sizes.max_num_seqs,
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
        forward = _forward(decoder, kv, cache, rows, scheduler, sizes, config.batch_invariant, memory)
    usage.settle(memory)
    return Parts(model, sizes, rows, pages, residency, scheduler, forward, pace, memory, usage)


def _forward(
    decoder: Decoder,
    kv: KVCache,
    cache: AdapterCache,
    rows: RowTable,
    scheduler: Scheduler,
    sizes: EngineSizes,
    is_invariant: bool,
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
            memory=memory,
        )
    return ModelForward(decoder, kv, cache, rows, scheduler)


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


def _memory(device: torch.device, memory: Memory) -> DeviceMemory | None:
    """What the weights have left of a CUDA device."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what loading the weights took for a moment
    free, total = torch.cuda.mem_get_info(device)
    weights = torch.cuda.memory_allocated(device) + memory.num_bytes
    return DeviceMemory(free_bytes=free, weight_bytes=weights, total_bytes=total)


def _free_host_bytes() -> int:
    """Memory that the machine has free, pages of files not counted."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
