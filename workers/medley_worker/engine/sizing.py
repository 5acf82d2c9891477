"""How large an engine's parts are: rows, step budget, KV pages. Pure functions of the configuration and of bytes.

Knows no tensors; how much memory is free is asked by who builds the parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from medley.spec.base_models import BaseModel
from medley.spec.wire import EngineConfig

# Tokens of a step where none are asked for. Beyond these a step gets longer without getting more efficient.
STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
# On a CPU, KV cache and everything else share the machine with other processes.
CPU_KV_BYTES = 1 << 30


def cpu_threads() -> int:
    """Threads for a model on a CPU that others use too: half of the cores this process may run on.

    A product's threads wait for each other by spinning; with a thread for each core, beside other busy
    processes, a step of a small model took 20 times as long as on one thread (2 cores, torch 2.13).
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


@dataclass(frozen=True, slots=True)
class EngineSizes:
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    num_pages: int
    page_size: int


def size_engine(
    config: EngineConfig, model: BaseModel, *, page_bytes: int, page_size: int, free_bytes: int
) -> EngineSizes:
    """Sizes for `config`. Raises ValueError naming the field that asks for too much or too little.

    page_bytes: of one KV page over all layers. free_bytes: what the KV cache may take where
    `kv_cache_bytes` is not given.
    """
    num_rows = config.max_num_seqs
    if num_rows < 1:
        raise ValueError(f"max_num_seqs: got {num_rows}, wanted 1 or more")
    max_len = model.max_model_len if config.max_model_len is None else config.max_model_len
    if not 2 <= max_len <= model.max_model_len:
        raise ValueError(f"max_model_len: got {max_len}, wanted 2 to {model.max_model_len}, the model's own")
    kv_bytes = free_bytes if config.kv_cache_bytes is None else config.kv_cache_bytes
    wanted = num_rows * -(-max_len // page_size)
    num_pages = min(kv_bytes // page_bytes, wanted)
    if num_pages * page_size < max_len:
        # One sequence of full length must fit alone, or it could never end.
        if config.max_model_len is not None or num_pages * page_size < 2:
            raise ValueError(
                f"kv_cache_bytes: got {kv_bytes}, wanted at least {-(-max_len // page_size) * page_bytes}"
                f" for one sequence of max_model_len {max_len}"
            )
        max_len = num_pages * page_size
    return EngineSizes(
        max_num_seqs=num_rows,
        max_model_len=max_len,
        max_num_batched_tokens=max(STEP_TOKENS[config.device.split(":")[0]], num_rows)
        if config.max_num_batched_tokens is None
        else config.max_num_batched_tokens,
        num_pages=num_pages,
        page_size=page_size,
    )
