"""Puts an engine's parts together: reads the model, sizes and allocates memory. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch

from medley.spec.base_models import BaseModel, read_base_model
from medley.spec.wire import EngineConfig
from medley_worker.engine.adapters import AdapterCache, tiles_for
from medley_worker.engine.forward import Forward, NullForward
from medley_worker.engine.pages import PagePool
from medley_worker.engine.residency import CachedResidency
from medley_worker.engine.rows import RowTable
from medley_worker.engine.runner import ModelForward
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import Sequence
from medley_worker.engine.sizing import CPU_KV_BYTES, EngineSizes, size_engine
from medley_worker.models import Decoder, KVCache, load_model
from medley_worker.models.kv import kv_page_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the free device memory; the rest is for activations.
CUDA_KV_SHARE = 0.9


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
        )
        model = decoder.config
    num_tiles = tiles_for(model, dtype=dtype, adapter_slots=config.adapter_slots, adapter_bytes=config.adapter_bytes)
    cache = AdapterCache(model, num_tiles=num_tiles, dtype=dtype, device=config.device)
    page_size = kv_page_size(config.device)
    sizes = size_engine(
        config,
        model,
        page_bytes=KVCache.page_bytes(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            page_size=page_size,
        ),
        page_size=page_size,
        free_bytes=_free_bytes(config.device),
    )
    rows = RowTable(sizes.max_num_seqs, sizes.max_model_len, sizes.page_size, model.eos_token_ids)
    pages = PagePool(sizes.num_pages, sizes.page_size)
    residency = CachedResidency(cache, announce)
    scheduler = Scheduler(rows, pages, residency, max_tokens=sizes.max_num_batched_tokens)
    forward: Forward
    if decoder is None:
        forward = NullForward(rows, model.vocab_size)
    else:
        kv = decoder.new_kv_cache(sizes.num_pages)
        forward = _forward(decoder, kv, cache, rows, scheduler, sizes)
    return Parts(model, sizes, rows, pages, residency, scheduler, forward)


def _forward(
    decoder: Decoder, kv: KVCache, cache: AdapterCache, rows: RowTable, scheduler: Scheduler, sizes: EngineSizes
) -> Forward:
    if decoder.device.type == "cuda":
        # FlashInfer is installed where there is CUDA.
        from medley_worker.engine.cuda_forward import CudaForward

        return CudaForward(decoder, kv, cache, rows, scheduler, max_tokens=sizes.max_num_batched_tokens)
    return ModelForward(decoder, kv, cache, rows, scheduler)


def _free_bytes(device: str) -> int:
    """What the KV cache may take on `device` when nobody says."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free * CUDA_KV_SHARE)
    return CPU_KV_BYTES
