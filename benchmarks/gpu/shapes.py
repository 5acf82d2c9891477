"""The models that GPU figures are about, by their configurations alone; weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medley.spec.base_models import BaseModel, linear_sites, read_base_model

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_WIDE = _LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Llama-2-7B, Llama-3-8B, Llama-2-13B.
    "7b": _LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "8b": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5},
    "13b": _LLAMA
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    # Llama-2-70B, and a tenth of its layers.
    "70b": _WIDE | {"num_hidden_layers": 80},
    "70b-8l": _WIDE | {"num_hidden_layers": 8},
}

# No figure is about it: it runs what is measured with the others, on any machine.
TINY: dict[str, Any] = _LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}


def write_config(name: str, folder: Path) -> Path:
    """Write a model's config.json, of CONFIGS or "tiny". Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps((CONFIGS | {"tiny": TINY})[name]))
    return folder


def base_model(name: str, folder: Path) -> BaseModel:
    """The shape of a model in CONFIGS; its config.json is written to `folder`."""
    return read_base_model(write_config(name, folder), need_weights=False)


def weight_bytes(model: BaseModel, itemsize: int = 2) -> int:
    """Bytes of the model's matrices, embedding and lm_head apart."""
    per_layer = sum(site.in_features * site.out_features for site in linear_sites(model))
    return (model.num_layers * per_layer + 2 * model.vocab_size * model.hidden_size) * itemsize


def kv_bytes(model: BaseModel, num_tokens: int, itemsize: int = 2) -> int:
    """Bytes of keys and values of so many tokens."""
    return num_tokens * model.num_layers * 2 * model.num_kv_heads * model.head_dim * itemsize


def adapter_weight_bytes(model: BaseModel, rank: int, itemsize: int = 2) -> int:
    """Bytes of A and B of an adapter of all seven projections."""
    per_layer = sum(site.in_features + site.out_features for site in linear_sites(model))
    return model.num_layers * per_layer * rank * itemsize
