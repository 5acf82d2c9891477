"""The files: base model, tokenizer and adapters, as Hugging Face and PEFT lay them out, in bfloat16.

Knows nothing of training.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from benchmarks.demo_assets.examples import BOS, EOS, NUM_TOKENS, PAD, VOCAB_SIZE
from benchmarks.demo_assets.network import LoraShape, LoraStack, TinyLlama

BASE_NAME = "medley-tiny"
SPECIAL = {"<s>": BOS, "</s>": EOS, "<pad>": PAD}


def write_model(model: TinyLlama, folder: Path) -> None:
    shape = model.shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": PAD,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": BOS, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", generation)
    tensors = {name: value.detach().bfloat16().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, max_len: int) -> None:
    """One token for a byte, its id the byte's value; `<s>` is put before a text."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    assert len(vocabulary) + len(SPECIAL) == NUM_TOKENS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert all(tokenizer.token_to_id(name) == token_id for name, token_id in SPECIAL.items())
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": max_len,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)


def byte_characters() -> list[str]:
    """What byte-level tokenizers write for each byte: itself where printable, else a character past 255."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def write_adapter(lora: LoraStack, index: int, shape: LoraShape, num_layers: int, folder: Path) -> None:
    """Adapter `index` of the stack as a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": shape.rank,
        "rank_pattern": {},
        "target_modules": sorted(shape.sites),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    _write_json(folder / "adapter_config.json", config)
    tensors = {}
    for layer in range(num_layers):
        for site in shape.sites:
            block = "self_attn" if site in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{site}"
            a = lora.a[f"{layer}_{site}"][index, :, : shape.rank]  # [in, r]
            b = lora.b[f"{layer}_{site}"][index, : shape.rank]  # [r, out]
            tensors[f"{prefix}.lora_A.weight"] = _stored(a.T)
            tensors[f"{prefix}.lora_B.weight"] = _stored(b.T)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _stored(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().bfloat16().cpu().contiguous()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
