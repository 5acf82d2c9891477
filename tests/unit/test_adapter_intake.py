"""Uploads made by hand: plain LoRA that fits the base is accepted, all else refused with every reason at once."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_bytes import framed, safetensors
from tiny_configs import CONFIGS, TINY

from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME, AdapterHeader, AdapterRefused, read_adapter
from medley.spec.base_models import BaseModel, linear_sites, read_base_model
from medley.spec.intake import CHUNK_BYTES, check_finite, check_upload
from medley.spec.safetensors_header import read_header

# (name of a half) -> (dtype, shape)
Tensors = dict[str, tuple[str, list[int]]]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    CONFIGS["llama"](**TINY).save_pretrained(folder)
    return read_base_model(folder, need_weights=False)


def half(layer: int, path: str, letter: str) -> str:
    return f"base_model.model.model.layers.{layer}.{path}.lora_{letter}.weight"


def sound(base: BaseModel, sites: tuple[str, ...] = ("q_proj", "down_proj"), rank: int = 4) -> Tensors:
    tensors: Tensors = {}
    for layer in range(base.num_layers):
        for site in linear_sites(base):
            if site.name in sites:
                tensors[half(layer, site.path, "A")] = ("F32", [rank, site.in_features])
                tensors[half(layer, site.path, "B")] = ("F32", [site.out_features, rank])
    return tensors


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
Q = "self_attn.q_proj"


def upload(base: BaseModel, config: object, weights: bytes) -> tuple[AdapterHeader | None, str]:
    config_bytes = config if isinstance(config, bytes) else json.dumps(config).encode()
    adapter, faults = check_upload(config_bytes, io.BytesIO(weights), base)
    assert (adapter is None) == bool(faults)
    return adapter, "; ".join(map(str, faults))


def test_the_smallest_sound_upload_is_accepted(base: BaseModel) -> None:
    adapter, _ = upload(base, CONFIG, safetensors(sound(base)))
    assert adapter is not None
    assert {target.scale for target in adapter.targets} == {2.0}
    assert len(adapter.targets) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "ADALORA"}, "adapter_config.peft_type: got 'ADALORA'"),
        ({"peft_type": None}, "adapter_config.peft_type: got None"),
        ({"task_type": "SEQ_CLS"}, "adapter_config.task_type"),
        ({"fan_in_fan_out": True}, "adapter_config.fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, "adapter_config.alora_invocation_tokens"),
        ({"target_parameters": ["mlp.gate"]}, "adapter_config.target_parameters"),
        ({"megatron_config": {"a": 1}}, "adapter_config.megatron_config"),
        ({"use_qalora": True}, "adapter_config.use_qalora"),
        ({"loftq_config": {"loftq_bits": 4}}, "adapter_config.loftq_config"),
        ({"init_lora_weights": "loftq"}, "adapter_config.init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "adapter_config.init_lora_weights"),
        ({"init_lora_weights": ["gaussian"]}, "adapter_config.init_lora_weights"),
        ({"layers_pattern": "h"}, "adapter_config.layers_pattern"),
        ({"an_option_of_tomorrow": 1}, "adapter_config.an_option_of_tomorrow"),
        ({"\x1b[31m": 1}, "adapter_config.\\x1b[31m"),
        ({"r": 0}, "adapter_config.r: got 0"),
        ({"r": -4}, "adapter_config.r: got -4"),
        ({"r": 4.0}, "adapter_config.r: got 4.0"),
        ({"r": True}, "adapter_config.r: got True"),
        ({"r": "4"}, "adapter_config.r: got '4'"),
        ({"r": 10**19}, "adapter_config.r"),
        ({"lora_alpha": "8"}, "adapter_config.lora_alpha"),
        ({"lora_alpha": True}, "adapter_config.lora_alpha"),
        ({"lora_alpha": 1e300}, "adapter_config.lora_alpha"),
        ({"lora_alpha": None}, "adapter_config.lora_alpha"),
        ({"use_rslora": 1}, "adapter_config.use_rslora"),
        ({"rank_pattern": []}, ""),
        ({"rank_pattern": ["q_proj"]}, "adapter_config.rank_pattern"),
        ({"rank_pattern": {"q_proj": None}}, "adapter_config.rank_pattern.q_proj"),
        ({"rank_pattern": {"lm_head": 4}}, "'lm_head'"),
        ({"rank_pattern": {"(a+)+$": 4}}, "no regular expressions"),
        ({"alpha_pattern": {"q_proj": "8"}}, "adapter_config.alpha_pattern.q_proj"),
        ({"target_modules": None}, "adapter_config.target_modules"),
        ({"target_modules": []}, "adapter_config.target_modules"),
        ({"target_modules": [1]}, "adapter_config.target_modules"),
        ({"target_modules": "q_proj"}, "adapter_config.target_modules"),
        ({"target_modules": ["q_proj", "down_proj", "proj"]}, "'proj'"),
        ({"target_modules": ["q_proj", "down_proj", ""]}, "''"),
        ({"layers_to_transform": [2]}, "adapter_config.layers_to_transform"),
        ({"layers_to_transform": [True]}, "adapter_config.layers_to_transform"),
        ({"layers_to_transform": "0"}, "adapter_config.layers_to_transform"),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_refused_by_key(
    base: BaseModel, change: dict[str, Any], says: str
) -> None:
    _, faults = upload(base, CONFIG | change, safetensors(sound(base)))
    assert says in faults
    assert bool(says) == bool(faults)


def test_options_that_are_off_and_notes_are_accepted(base: BaseModel) -> None:
    notes = {
        "base_model_name_or_path": "acme/llama",
        "peft_version": "0.99.0",
        "lora_dropout": 0.05,
        "task_type": "CAUSAL_LM",
        "layers_pattern": ["layers"],
        "layers_to_transform": [],
    }
    off = dict.fromkeys(("use_dora", "modules_to_save", "an_option_of_tomorrow"), None) | {"use_new_thing": False}
    adapter, faults = upload(base, CONFIG | notes | off, safetensors(sound(base)))
    assert adapter is not None, faults


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "adapter_config.json: got list"),
        (b"null", "adapter_config.json: got NoneType"),
        (b'{"r": 4, "r": 8}', "stands twice"),
        (b'{"lora_alpha": Infinity}', "Infinity is not a JSON number"),
        (b'{"lora_alpha": 1e400}', "out of range"),
        (b'{"r": ' + b"1" * 100_000 + b"}", "out of range"),
        (b'{"a": ' * 100_000, "the limit is"),
        (b'{"a": ' * 1_000, "nested deeper"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b" " * (257 << 10), "the limit is 262144"),
    ],
)
def test_a_configuration_that_is_no_sound_json_is_refused(base: BaseModel, config: bytes, says: str) -> None:
    assert says in upload(base, config, safetensors(sound(base)))[1]


def test_every_reason_in_both_files_is_named_in_one_answer(base: BaseModel) -> None:
    tensors = sound(base)
    del tensors[half(0, Q, "B")]
    tensors[half(1, Q, "A")] = ("F32", [4, 31])
    tensors["base_model.model.lm_head.weight"] = ("F32", [64, 32])
    tensors["z"] = ("I64", [1])
    weights = safetensors(tensors)
    weights = weights[:-12] + struct.pack("<f", math.nan) + weights[-8:]  # the last value of lm_head
    change = {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "layer_replication": [[0, 2]]}
    _, faults = upload(base, CONFIG | change, weights)
    for says in (
        *change,
        f"{half(0, Q, 'B')}: got no such tensor",
        f"{half(1, Q, 'A')}: got shape [4, 31], wanted [rank, 32]",
        "base_model.model.lm_head.weight: got a tensor that is no half",
        "z: got I64, wanted F32 or F16 or BF16",
        "base_model.model.lm_head.weight: got NaN or infinity",
    ):
        assert says in faults


def test_a_broken_header_is_named_beside_the_faults_of_the_configuration(base: BaseModel) -> None:
    _, faults = upload(base, CONFIG | {"use_dora": True}, framed(b"{", b""))
    assert "use_dora" in faults
    assert "not JSON" in faults


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_missing_half_is_refused(base: BaseModel, letter: str) -> None:
    tensors = sound(base)
    del tensors[half(1, "mlp.down_proj", letter)]
    assert f"{half(1, 'mlp.down_proj', letter)}: got no such tensor" in upload(base, CONFIG, safetensors(tensors))[1]


def test_layers_named_without_tensors_and_tensors_of_layers_not_named_are_refused(base: BaseModel) -> None:
    _, faults = upload(base, CONFIG | {"target_modules": ["q_proj", "k_proj"]}, safetensors(sound(base)))
    assert f"{half(0, 'self_attn.k_proj', 'A')}: got no such tensor, nor its lora_B" in faults
    assert f"{half(1, 'mlp.down_proj', 'B')}: got a layer that the configuration leaves out" in faults
    _, faults = upload(base, CONFIG | {"layers_to_transform": [0]}, safetensors(sound(base)))
    assert f"{half(1, Q, 'A')}: got a layer that the configuration leaves out" in faults
    assert half(0, Q, "A") not in faults
    _, faults = upload(base, CONFIG, safetensors({}))
    assert "no such tensor" in faults


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (half(0, Q, "A"), [32, 4], "got shape [32, 4], wanted [rank, 32]"),
        (half(0, Q, "A"), [5, 32], "got rank 5, wanted rank 4"),
        (half(0, Q, "B"), [32, 5], "got rank 5, wanted rank 4"),
        (half(0, Q, "B"), [32], "got shape [32], wanted [32, rank]"),
        (half(0, Q, "B"), [32, 4, 1], "got shape [32, 4, 1]"),
        (half(0, Q, "A"), [], "got shape []"),
        (half(0, Q, "A"), [0, 32], "got rank 0"),
    ],
)
def test_a_shape_that_fits_neither_base_nor_rank_is_refused(
    base: BaseModel, name: str, shape: list[int], says: str
) -> None:
    tensors = sound(base)
    tensors[name] = ("F32", shape)
    assert f"{name}: {says}" in upload(base, CONFIG, safetensors(tensors))[1]


@pytest.mark.parametrize("dtype", ["F64", "I64"])
def test_dtypes_other_than_the_three_floats_and_mixtures_are_refused(base: BaseModel, dtype: str) -> None:
    tensors = {name: (dtype, shape) for name, (_, shape) in sound(base).items()}
    assert f"got {dtype}, wanted F32 or F16 or BF16" in upload(base, CONFIG, safetensors(tensors))[1]
    mixed = sound(base)
    mixed[half(0, Q, "A")] = ("BF16", [4, 32])
    assert "got BF16, F32, wanted one dtype for all tensors" in upload(base, CONFIG, safetensors(mixed))[1]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(base: BaseModel, name: str) -> None:
    assert (
        f"{name}: got a tensor that is no half"
        in upload(base, CONFIG, safetensors(sound(base) | {name: ("F32", [4, 32])}))[1]
    )


BIT_PATTERNS = {
    "F32": ("<I", [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000], [0x7F7FFFFF, 0x80000000, 1, 0xFF7FFFFF]),
    "F16": ("<H", [0x7C00, 0xFC00, 0x7C01, 0xFFFF], [0x7BFF, 0x8000, 1, 0xFBFF]),
    "BF16": ("<H", [0x7F80, 0xFF80, 0x7F81, 0xFFFF], [0x7F7F, 0x8000, 1, 0xFF7F]),
}


@pytest.mark.parametrize("dtype", BIT_PATTERNS)
def test_nan_and_infinity_are_found_wherever_they_stand_and_nothing_else_is(base: BaseModel, dtype: str) -> None:
    tensors = {name: (dtype, shape) for name, (_, shape) in sound(base).items()}
    weights = safetensors(tensors)
    pack, spoiled, finite = BIT_PATTERNS[dtype]
    num_bytes = struct.calcsize(pack)
    data_start = 8 + struct.unpack("<Q", weights[:8])[0]
    names = list(tensors)
    for at in (0, num_bytes, len(weights) - data_start - num_bytes):
        for pattern in (*spoiled, *finite):
            changed = bytearray(weights)
            changed[data_start + at : data_start + at + num_bytes] = struct.pack(pack, pattern)
            _, faults = upload(base, CONFIG, bytes(changed))
            assert ("got NaN or infinity" in faults) == (pattern in spoiled)
            if pattern in spoiled:
                assert (names[0] if at <= num_bytes else names[-1]) in faults


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(BIT_PATTERNS)), st.integers(0, 3 * CHUNK_BYTES // 4 - 1), st.binary(min_size=64, max_size=64)
)
def test_the_scan_agrees_with_torch_on_random_bits_across_chunks(dtype: str, at: int, noise: bytes) -> None:
    pack, spoiled, finite = BIT_PATTERNS[dtype]
    num_bytes = struct.calcsize(pack)
    num_values = 3 * CHUNK_BYTES // num_bytes + 5
    data = bytearray(struct.pack(pack, finite[0]) * num_values)
    data[at * num_bytes : at * num_bytes + len(noise)] = noise
    if at % 3 == 0:
        data[at * num_bytes : (at + 1) * num_bytes] = struct.pack(pack, spoiled[at % len(spoiled)])
    data = data[: num_values * num_bytes]
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    file = io.BytesIO(safetensors({"t": (dtype, [num_values])}, bytes(data)))
    header = read_header(file, size_bytes=len(file.getvalue()))
    assert (check_finite(file, header) == []) == bool(torch.frombuffer(data, dtype=kind).isfinite().all())


def test_a_folder_with_a_pickle_in_place_of_the_weights_is_refused_by_name(tmp_path: Path, base: BaseModel) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG | {"use_dora": True}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(tmp_path, base)
    assert "a pickle (adapter_model.bin)" in str(caught.value)
    assert "use_dora" in str(caught.value)


def test_an_empty_folder_is_refused_for_both_files(tmp_path: Path, base: BaseModel) -> None:
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(tmp_path, base)
    assert {fault.field for fault in caught.value.faults} == {CONFIG_NAME, WEIGHTS_NAME}


def test_an_adapter_of_another_base_is_refused_with_a_bounded_answer(base: BaseModel) -> None:
    tensors = {f"base_model.model.model.layers.{i}.{Q}.lora_A.weight": ("F32", [4, 33]) for i in range(200)}
    adapter, faults = check_upload(json.dumps(CONFIG).encode(), io.BytesIO(safetensors(tensors)), base)
    assert adapter is None
    assert len(faults) <= 102
    assert "more faults" in str(faults[-1])
