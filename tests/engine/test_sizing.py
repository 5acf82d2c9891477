"""What an engine makes of a device's memory: pure numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from medley.spec.base_models import BaseModel, read_base_model
from medley.spec.wire import EngineConfig
from medley_worker.engine.sizing import (
    CPU_HOST_BYTES,
    CUDA_CONTEXT_BYTES,
    CUDA_HOST_BYTES,
    DeviceMemory,
    EngineSizes,
    Shape,
    activation_bytes,
    host_copy_bytes,
    size_engine,
    trunk_graph_bytes,
)

GIB = 1 << 30
# Llama-2-7B's: a page of 16 tokens over 32 layers, a tile of gate and up.
SHAPE = Shape(dtype_bytes=2, page_bytes=16 * 512 << 10, page_size=16, tile_bytes=15 << 20, adapter_tiles=64)
MEMORY = DeviceMemory(free_bytes=125 * GIB, weight_bytes=13 * GIB, total_bytes=140 * GIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("llama2")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return read_base_model(Path(folder), need_weights=False)


def sizes(model: BaseModel, memory: DeviceMemory | None = MEMORY, **fields: Any) -> EngineSizes:
    device = "cpu" if memory is None else "cuda"
    config = EngineConfig(**{"model_dir": "", "device": device, "max_num_seqs": 64} | fields)
    return size_engine(config, model, SHAPE, memory)


def taken(model: BaseModel, got: EngineSizes) -> int:
    activations = activation_bytes(model, 2, got.max_num_batched_tokens, got.max_num_seqs)
    activations += trunk_graph_bytes(model, 2, got.max_num_batched_tokens + got.max_num_seqs)
    return activations + got.num_pages * SHAPE.page_bytes + (got.num_tiles + 1) * SHAPE.tile_bytes


def test_a_device_is_shared_between_activations_adapters_and_pages(model: BaseModel) -> None:
    got = sizes(model, max_num_seqs=1024)
    assert got.max_num_batched_tokens == 2048
    assert 0.15 < got.num_tiles * SHAPE.tile_bytes / MEMORY.free_bytes < 0.2
    assert MEMORY.free_bytes - 2 * SHAPE.page_bytes < taken(model, got) <= MEMORY.free_bytes


def test_an_engine_whose_passes_have_one_shape_keeps_no_memory_for_graphs_of_prompts(model: BaseModel) -> None:
    fields = {"max_num_seqs": 1024, "adapter_slots": 1}
    graphs = trunk_graph_bytes(model, 2, 1024 + 2048)
    more = sizes(model, batch_invariant=True, **fields).num_pages - sizes(model, **fields).num_pages
    assert graphs // SHAPE.page_bytes <= more <= graphs // SHAPE.page_bytes + 1


def test_pages_past_what_all_rows_can_fill_are_not_asked_for(model: BaseModel) -> None:
    assert sizes(model, max_num_seqs=16).num_pages == 16 * 256


def test_what_is_asked_for_is_given_and_the_rest_is_pages(model: BaseModel) -> None:
    slots = sizes(model, adapter_slots=8, max_num_seqs=1024)
    assert slots.num_tiles == 512
    assert taken(model, slots) > MEMORY.free_bytes - 2 * SHAPE.page_bytes
    by_bytes = sizes(model, adapter_bytes=GIB, kv_cache_bytes=GIB)
    assert by_bytes.num_tiles == GIB // SHAPE.tile_bytes
    assert by_bytes.num_pages == GIB // SHAPE.page_bytes
    assert sizes(model, adapter_bytes=0).num_tiles == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_slots": 1000}, r"adapter_slots: got 1000, .* wanted at most \d+, .* weights and \d+ of activations"),
        ({"adapter_bytes": 124 * GIB}, r"adapter_bytes: got \d+, .* wanted at most \d+"),
        ({"kv_cache_bytes": 124 * GIB}, r"kv_cache_bytes: got \d+, wanted at most \d+, .* of adapters leave"),
        ({"kv_cache_bytes": 1}, r"kv_cache_bytes: got 1, wanted at least \d+"),
        ({"max_num_batched_tokens": 10**6}, r"max_num_batched_tokens: got 1000000 .* \d+ bytes of activations"),
        ({"adapter_slots": 1, "adapter_bytes": 1}, "adapter_slots and adapter_bytes"),
        ({"adapter_slots": -1}, "adapter_slots"),
        ({"adapter_bytes": -1}, "adapter_bytes"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 5000}, "max_model_len"),
        ({"gpu_share": 1.5}, "gpu_share: got 1.5, wanted above 0 and at most 1"),
        ({"gpu_share": 0.05}, r"gpu_share: got 0.05, \d+ bytes; wanted more than weights and context, \d+ bytes"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name_in_bytes(
    model: BaseModel, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sizes(model, **fields)


def test_a_small_device_keeps_half_of_what_is_left_for_pages(model: BaseModel) -> None:
    got = sizes(model, DeviceMemory(4 * GIB, 13 * GIB), max_num_seqs=8, max_num_batched_tokens=256)
    assert got.num_pages * SHAPE.page_bytes > got.num_tiles * SHAPE.tile_bytes > GIB // 2


def test_engines_that_share_a_gpu_fit_on_it_together(model: BaseModel) -> None:
    got = sizes(model, gpu_share=0.5, max_num_seqs=1024)
    own = MEMORY.total_bytes // 2 - MEMORY.weight_bytes - CUDA_CONTEXT_BYTES
    assert own - 2 * SHAPE.page_bytes < taken(model, got) <= own
    little_is_free = DeviceMemory(20 * GIB, MEMORY.weight_bytes, MEMORY.total_bytes)
    assert taken(model, sizes(model, little_is_free, gpu_share=0.5)) <= 20 * GIB, "what is free is the limit still"


def test_a_cpu_takes_fixed_sizes(model: BaseModel) -> None:
    got = sizes(model, None)
    assert got.num_tiles == 64  # of one adapter of rank 128, more than the default's 256 MiB
    assert got.num_pages == GIB // SHAPE.page_bytes
    assert got.max_num_batched_tokens == 1024


def test_host_copies_take_at_most_half_of_the_machines_free_memory() -> None:
    cpu, cuda = EngineConfig(model_dir=""), EngineConfig(model_dir="", device="cuda")
    assert host_copy_bytes(cpu, 100 * GIB) == CPU_HOST_BYTES
    assert host_copy_bytes(cuda, 100 * GIB) == CUDA_HOST_BYTES
    assert host_copy_bytes(cuda, 10 * GIB) == 5 * GIB
    assert host_copy_bytes(EngineConfig(model_dir="", device="cuda", adapter_host_bytes=7), 0) == 7
    with pytest.raises(ValueError, match="adapter_host_bytes: got -1"):
        host_copy_bytes(EngineConfig(model_dir="", adapter_host_bytes=-1), 0)
