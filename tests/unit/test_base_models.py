"""Configurations that transformers writes are read as transformers reads them; all else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import transformers
from tiny_configs import CONFIGS

from medley.spec.base_models import BaseModel, RopeScaling, UnsupportedModel, linear_sites, read_base_model

TINY = tiny_configs.TINY | {"num_hidden_layers": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path) -> BaseModel:
    return read_base_model(folder, need_weights=False)


def refusal(folder: Path, *, need_weights: bool = False) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        read_base_model(folder, need_weights=need_weights)
    return str(caught.value)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("rope", [{}, {"rope_theta": 500_000.0}, {"rope_theta": 5e5, **LLAMA3_ROPE}])
def test_what_transformers_saves_is_read_as_transformers_means_it(
    tmp_path: Path, model_type: str, rope: dict[str, Any]
) -> None:
    theirs = CONFIGS[model_type](**TINY, rope_parameters={"rope_type": "default", "rope_theta": 1e4} | rope)
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)
    assert ours.model_type == model_type
    assert ours.architecture.lower() == f"{model_type}forcausallm"
    assert (ours.num_layers, ours.hidden_size, ours.intermediate_size) == (4, 32, 48)
    assert (ours.num_heads, ours.num_kv_heads, ours.vocab_size, ours.max_model_len) == (4, 2, 64, 256)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if "factor" in rope:
        assert ours.rope_scaling == RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
        )
    else:
        assert ours.rope_scaling is None


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rope_theta": 1e6},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"}},
        {"rope_scaling": None, "rope_theta": 1e4, "head_dim": 16},
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": None, "use_sliding_window": True},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ],
)
def test_the_older_form_is_read_as_transformers_reads_it(
    tmp_path: Path, model_type: str, values: dict[str, Any]
) -> None:
    """transformers itself, given the same file, is the judge."""
    write_config(tmp_path, TINY | {"model_type": model_type} | values)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = read(tmp_path)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if theirs.rope_parameters["rope_type"] == "llama3":
        assert ours.rope_scaling is not None
        assert ours.rope_scaling.original_max_len == theirs.rope_parameters["original_max_position_embeddings"]
    else:
        assert ours.rope_scaling is None
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.layer_windows == windows_of(theirs)
    assert ours.sliding_window == (max((w for w in windows_of(theirs) if w), default=None))


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The windows that transformers' attention layers take from a configuration."""
    if config.model_type == "llama":
        return (None,) * config.num_hidden_layers
    if config.model_type == "mistral":
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_keys_that_a_file_leaves_out_take_the_defaults_of_transformers(tmp_path: Path, model_type: str) -> None:
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    given = {key: TINY[key] for key in needed} | {"num_attention_heads": 32, "hidden_size": 64}
    write_config(tmp_path, given | {"model_type": model_type})
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), read(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.max_model_len == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.layer_windows == windows_of(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_linear_sites_are_the_modules_that_transformers_builds(tmp_path: Path, model_type: str) -> None:
    config = CONFIGS[model_type](**TINY)
    config.save_pretrained(tmp_path)
    ours = read(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    for site in linear_sites(ours):
        module = layer.get_submodule(site.path)
        assert site.path.endswith(f".{site.name}")
        assert (module.in_features, module.out_features) == (site.in_features, site.out_features)
        assert (module.bias is not None) == (ours.qkv_bias and site.group == "qkv")
    assert hasattr(layer.self_attn, "q_norm") == ours.qk_norm
    assert len(linear_sites(ours)) == 7


def test_several_end_tokens_come_from_generation_config_before_config(tmp_path: Path) -> None:
    write_config(tmp_path, TINY | {"model_type": "llama"})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 9]}))
    assert read(tmp_path).eos_token_ids == (2, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert read(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [64]}))
    assert "eos_token_id" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'"),
        ({"model_type": None}, "model_type: got None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: got 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling: got 'llama3'"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": 34}, "hidden_size: got 34"),
        ({"num_local_experts": 8}, "num_local_experts: got 8"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": "64"}, "vocab_size"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"bos_token_id": 64}, "bos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
    ],
)
def test_what_the_decoders_do_not_compute_is_refused_by_name(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    assert says in refusal(write_config(tmp_path, TINY | {"model_type": "llama"} | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": [[], {}, 1, 2]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ],
)
def test_windows_and_biases_of_other_families_are_refused_by_name(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    assert says in refusal(write_config(tmp_path, TINY | values))


def test_all_reasons_are_named_at_once(tmp_path: Path) -> None:
    values = {"quantization_config": {}, "hidden_act": "relu", "mlp_bias": True, "rope_scaling": {"type": "linear"}}
    message = refusal(
        write_config(tmp_path, TINY | {"model_type": "llama", "vocab_size": 0} | values), need_weights=True
    )
    for name in (*values, "vocab_size", "weights"):
        assert name in message


def test_weights_are_one_file_or_whole_shards(tmp_path: Path) -> None:
    write_config(tmp_path, TINY | {"model_type": "llama"})
    assert "no weight files" in refusal(tmp_path, need_weights=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickles only (pytorch_model.bin)" in refusal(tmp_path, need_weights=True)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}))
    message = refusal(tmp_path, need_weights=True)
    assert "m-1.safetensors is missing" in message
    assert "m-2.safetensors is missing" in message
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert read_base_model(tmp_path).weight_files == ("m-1.safetensors", "m-2.safetensors")
    for broken in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": "../m-1.safetensors"}}, []):
        index.write_text(json.dumps(broken))
        assert "model.safetensors.index.json" in refusal(tmp_path, need_weights=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert read_base_model(tmp_path).weight_files == ("model.safetensors",)


def test_a_folder_without_a_readable_configuration_says_so(tmp_path: Path) -> None:
    assert "config.json: got No such file" in refusal(tmp_path)
    for text in ("", "[]", "{", '{"a": 1, "a": 2}', "[" * 1000, "null"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (2 << 20))
    assert "the limit is" in refusal(tmp_path)
