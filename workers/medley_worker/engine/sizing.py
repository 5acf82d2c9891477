"""How large an engine's parts are: rows, step budget, KV pages, adapter tiles. Pure functions of numbers of bytes.

Knows no tensors; how much memory is free is asked by who builds the parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from medley.spec.base_models import BaseModel
from medley.spec.wire import EngineConfig
from medley_worker.engine.step_inputs import token_buckets

# Tokens of a step where none are asked for. Beyond these a step gets longer without getting more efficient.
STEP_TOKENS = {"cpu": 1024, "cuda": 2048}
# On a CPU, KV cache and everything else share the machine with other processes.
CPU_KV_BYTES = 1 << 30
CPU_ADAPTER_BYTES = 256 << 20
CUDA_ADAPTER_SHARE = 0.2  # of what is free after weights and activations
# Packed adapters in host memory; on CUDA it is pinned, and other processes need memory as well.
CPU_HOST_BYTES = 1 << 30
CUDA_HOST_BYTES = 16 << 30
CUDA_HOST_SHARE = 0.5  # of the machine's free memory
# Kernels and their workspaces, decode steps' graphs and their pool, what allocators round up.
CUDA_FIXED_BYTES = 1 << 30
# Of the device's, a graph of what lies between two attentions: 1,584 of them and one step's tokens took 430 MiB, what
# their stream's products work in included (7B shape, one H200, CUDA 13.0).
GRAPH_BYTES = 240 << 10
# A context, which is there before memory is asked for what is free.
CUDA_CONTEXT_BYTES = 512 << 20
# A logit on its way to a token: the model's dtype, float32 twice, sorted with its place, the noise's two hashes.
LOGIT_BYTES = 48


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
    num_tiles: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What one of each takes. dtype_bytes: of a number. page_bytes: of a KV page over all layers.

    adapter_tiles: tiles that an adapter of the largest rank takes on all sites.
    """

    dtype_bytes: int
    page_bytes: int
    page_size: int
    tile_bytes: int
    adapter_tiles: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device that belongs to the engine. free_bytes: what the weights, weight_bytes, have left of its total_bytes."""

    free_bytes: int
    weight_bytes: int
    total_bytes: int = 0


def size_engine(config: EngineConfig, model: BaseModel, shape: Shape, memory: DeviceMemory | None) -> EngineSizes:
    """Sizes for `config`. Raises ValueError naming the field that asks for too much or too little.

    memory: None for a CPU, where KV cache and adapters take fixed sizes unless asked otherwise.
    """
    _check_adapter_fields(config)
    num_rows = config.max_num_seqs
    if num_rows < 1:
        raise ValueError(f"max_num_seqs: got {num_rows}, wanted 1 or more")
    max_len = model.max_model_len if config.max_model_len is None else config.max_model_len
    if not 2 <= max_len <= model.max_model_len:
        raise ValueError(f"max_model_len: got {max_len}, wanted 2 to {model.max_model_len}, the model's own")
    step_tokens = config.max_num_batched_tokens
    if step_tokens is None:
        step_tokens = max(STEP_TOKENS[config.device.split(":")[0]], num_rows)
    if memory is None:
        num_tiles = _num_tiles(config, shape, max(shape.adapter_tiles * shape.tile_bytes, CPU_ADAPTER_BYTES))
        kv_bytes = CPU_KV_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    else:
        num_tiles, kv_bytes = _share(config, model, shape, memory, step_tokens)
    wanted = num_rows * -(-max_len // shape.page_size)
    num_pages = min(kv_bytes // shape.page_bytes, wanted)
    if num_pages * shape.page_size < max_len:
        # One sequence of full length must fit alone, or it could never end.
        if config.max_model_len is not None or num_pages * shape.page_size < 2:
            raise ValueError(
                f"kv_cache_bytes: got {kv_bytes}, wanted at least {-(-max_len // shape.page_size) * shape.page_bytes}"
                f" for one sequence of max_model_len {max_len}"
            )
        max_len = num_pages * shape.page_size
    return EngineSizes(num_rows, max_len, step_tokens, num_pages, shape.page_size, num_tiles)


def activation_bytes(model: BaseModel, dtype_bytes: int, step_tokens: int, num_rows: int, num_ranks: int = 1) -> int:
    """What a step needs beside weights, KV and adapters, by estimate.

    A token's widest moment: the residual and its norm, q, k, v and the attention's output, gate, up and their
    product; half as much again for what the allocator cannot use in between. Then the logits of each row, and what
    more than two ranks take to add in their order.
    """
    sums = step_tokens * model.hidden_size * (num_ranks * dtype_bytes + 4) if num_ranks > 2 else 0
    logits = num_rows * model.vocab_size * LOGIT_BYTES
    return step_tokens * _token_bytes(model, dtype_bytes) * 3 // 2 + logits + sums + CUDA_FIXED_BYTES


def trunk_graph_bytes(model: BaseModel, dtype_bytes: int, max_tokens: int) -> int:
    """What the graphs of steps with prompts hold, with and without LoRA, and their tokens. max_tokens: of a step."""
    buckets = token_buckets(max_tokens)
    return 2 * len(buckets) * (model.num_layers + 1) * GRAPH_BYTES + buckets[-1] * _token_bytes(model, dtype_bytes)


def _token_bytes(model: BaseModel, dtype_bytes: int) -> int:
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return (3 * model.hidden_size + heads + 3 * model.intermediate_size) * dtype_bytes


def host_copy_bytes(config: EngineConfig, free_host_bytes: int) -> int:
    """Bytes of packed adapters that one rank keeps in host memory; the engine's are divided among its ranks."""
    if config.adapter_host_bytes is not None:
        if config.adapter_host_bytes < 0:
            raise ValueError(f"adapter_host_bytes: got {config.adapter_host_bytes}, wanted 0 or more")
        return config.adapter_host_bytes // config.tensor_parallel
    if not config.device.startswith("cuda"):
        return CPU_HOST_BYTES // config.tensor_parallel
    return min(CUDA_HOST_BYTES, int(free_host_bytes * CUDA_HOST_SHARE)) // config.tensor_parallel


def _share(
    config: EngineConfig, model: BaseModel, shape: Shape, memory: DeviceMemory, step_tokens: int
) -> tuple[int, int]:
    """(adapter tiles, bytes of KV cache) out of a device's free memory."""
    activations = activation_bytes(model, shape.dtype_bytes, step_tokens, config.max_num_seqs, config.tensor_parallel)
    if not config.batch_invariant:  # whose passes have one shape
        activations += trunk_graph_bytes(model, shape.dtype_bytes, step_tokens + config.max_num_seqs)
    free_bytes = _free_bytes(config, memory)
    left = free_bytes - activations
    taken = f"{memory.weight_bytes} bytes of weights and {activations} of activations"
    if left < shape.page_bytes:
        raise ValueError(
            f"max_num_batched_tokens: got {step_tokens} with max_num_seqs {config.max_num_seqs}, which take"
            f" {activations} bytes of activations; wanted less than the {free_bytes} bytes that are free"
            f" beside {memory.weight_bytes} bytes of weights"
        )
    default = min(max(shape.adapter_tiles * shape.tile_bytes, int(left * CUDA_ADAPTER_SHARE)), left // 2)
    num_tiles = _num_tiles(config, shape, default)
    adapters = (num_tiles + 1) * shape.tile_bytes  # one tile more: zeros
    if adapters > left - shape.page_bytes:
        field, got = ("adapter_bytes", config.adapter_bytes)
        if config.adapter_slots is not None:
            field, got = ("adapter_slots", config.adapter_slots)
        raise ValueError(
            f"{field}: got {got}, which takes {adapters} bytes; wanted at most {left - shape.page_bytes},"
            f" what {taken} leave"
        )
    left -= adapters
    if config.kv_cache_bytes is None:
        return num_tiles, left
    if config.kv_cache_bytes > left:
        raise ValueError(
            f"kv_cache_bytes: got {config.kv_cache_bytes}, wanted at most {left},"
            f" what {taken} and {adapters} of adapters leave"
        )
    return num_tiles, config.kv_cache_bytes


def _free_bytes(config: EngineConfig, memory: DeviceMemory) -> int:
    """What this engine may still take: all that is free, or no more than its share."""
    share = config.gpu_share
    if share is None:
        return memory.free_bytes
    if not 0 < share <= 1:
        raise ValueError(f"gpu_share: got {share}, wanted above 0 and at most 1")
    taken = memory.weight_bytes + CUDA_CONTEXT_BYTES
    own = int(share * memory.total_bytes)
    if own <= taken:
        raise ValueError(f"gpu_share: got {share}, {own} bytes; wanted more than weights and context, {taken} bytes")
    return min(memory.free_bytes, own - taken)


def _check_adapter_fields(config: EngineConfig) -> None:
    if config.adapter_slots is not None and config.adapter_bytes is not None:
        raise ValueError("adapter_slots and adapter_bytes: got both, wanted one of them")
    for name, value in (("adapter_slots", config.adapter_slots), ("adapter_bytes", config.adapter_bytes)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: got {value}, wanted 0 or more")


def _num_tiles(config: EngineConfig, shape: Shape, default_bytes: int) -> int:
    """adapter_slots: room for so many adapters of the largest rank. adapter_bytes: what fits into so many bytes."""
    if config.adapter_slots is not None:
        return config.adapter_slots * shape.adapter_tiles
    wanted = default_bytes if config.adapter_bytes is None else config.adapter_bytes
    return wanted // shape.tile_bytes
