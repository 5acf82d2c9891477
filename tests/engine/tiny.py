"""Tiny random models and adapters, made by transformers and PEFT themselves, and those two as the judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

VOCAB = 131
ALL_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than usual, so that logits differ by far more than rounding does.
    "initializer_range": 0.15,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Any] = {
    "llama2": lambda: LlamaConfig(**_COMMON | {"num_key_value_heads": 4}),
    "llama3": lambda: LlamaConfig(**_COMMON, rope_parameters=_LLAMA3_ROPE),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON | {"tie_word_embeddings": True}, head_dim=24),
}


@dataclass(frozen=True)
class TinyAdapter:
    """What to make of an adapter; the keywords go to PEFT's LoraConfig."""

    r: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ALL_SITES
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


# Ranks from 1 to 128, rsLoRA, both patterns, subsets of the layers.
MIXED_ADAPTERS: dict[str, TinyAdapter] = {
    "rank1": TinyAdapter(r=1, lora_alpha=2, seed=1),
    "rank8": TinyAdapter(r=8, seed=2),
    "rank12_attention": TinyAdapter(r=12, target_modules=("q_proj", "v_proj"), seed=3),
    "rank16_rslora": TinyAdapter(r=16, extra={"use_rslora": True}, seed=4),
    "rank128": TinyAdapter(r=128, lora_alpha=64, seed=5),
    "mlp_only": TinyAdapter(r=4, target_modules=("down_proj", "gate_proj"), seed=6),
    "patterns": TinyAdapter(
        r=8, seed=7, extra={"rank_pattern": {"q_proj": 24, "up_proj": 3}, "alpha_pattern": {"v_proj": 40}}
    ),
    "one_layer": TinyAdapter(r=5, seed=8, target_modules=("o_proj",), extra={"layers_to_transform": [1]}),
}


def make_model(kind: str, folder: Path, *, sharded: bool = False, **changes: Any) -> Path:
    """A random model of a kind in MODELS, saved by transformers. Returns its folder."""
    torch.manual_seed(len(kind))
    config = MODELS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts these at 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    return folder


def make_adapter(model_dir: Path, folder: Path, spec: TinyAdapter) -> Path:
    """A random adapter saved by PEFT. Returns its folder."""
    torch.manual_seed(1000 + spec.seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=list(spec.target_modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **spec.extra,
    )
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    return folder


def make_adapters(model_dir: Path, folder: Path, specs: dict[str, TinyAdapter] = MIXED_ADAPTERS) -> dict[str, Path]:
    """Every adapter of `specs`, each in a folder of its name."""
    return {name: make_adapter(model_dir, folder / name, spec) for name, spec in specs.items()}


def copy_adapter(source: Path, folder: Path, seed: int) -> Path:
    """A quick further adapter of the same shape with other weights."""
    folder.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * tensor.std()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return folder


class Judge:
    """transformers + PEFT in float32, one adapter at a time."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        for name, folder in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name).eval()

    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: str | None) -> torch.Tensor:
        """[len(token_ids), V] float32 with one adapter, or the base alone."""
        ids = torch.tensor([token_ids])
        if not isinstance(self._model, PeftModel):
            return self._model(ids).logits[0]
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(ids).logits[0]
        self._model.set_adapter(adapter)
        return self._model(ids).logits[0]


@cache
def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids that are no end token."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
