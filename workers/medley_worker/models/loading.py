"""From a Hugging Face folder, or from a configuration alone, to a Decoder. Owns names and shapes of weights.

Reads safetensors and nothing else. Every tensor must be known, present once and of the shape the configuration
gives; all that is wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.spec.adapters import FLOAT_DTYPES
from medley.spec.base_models import BaseModel, UnsupportedModel, linear_sites, read_base_model
from medley.spec.errors import Fault
from medley_worker.models.decoder import Decoder, DecoderWeights, LayerWeights

LOAD_FORMATS = ("safetensors", "random")
RANDOM_STD = 0.02  # transformers' own initializer_range
MAX_FAULTS_SHOWN = 20

Take = Callable[[str], Tensor]


def load_model(
    model_dir: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_format: str = "safetensors",
    seed: int = 0,
) -> Decoder:
    """The model in a folder, on `device`, in `dtype`.

    load_format "random" makes weights from the configuration and `seed`, and reads no weight files.
    Raises UnsupportedModel with every fault of configuration or weights, ValueError for an unknown load_format.
    """
    model_dir = Path(model_dir)
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}, wanted one of {', '.join(LOAD_FORMATS)}")
    config = read_base_model(model_dir, need_weights=load_format == "safetensors")
    if load_format == "random":
        tensors = _random_tensors(config, dtype, device, seed)
    else:
        tensors = _read_tensors(model_dir, config, dtype)
    return Decoder(config, _pack(config, tensors, device))


def tensor_shapes(config: BaseModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, as transformers saves it (linear weights [out, in])."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for site in linear_sites(config):
            shapes[f"{at}.{site.path}.weight"] = (site.out_features, site.in_features)
            if config.qkv_bias and site.group == "qkv":
                shapes[f"{at}.{site.path}.bias"] = (site.out_features,)
        if config.qk_norm:
            shapes[f"{at}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _read_tensors(model_dir: Path, config: BaseModel, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = tensor_shapes(config)
    found: dict[str, Tensor] = {}
    faults: list[Fault] = []

    def refuse(field: str, got: str, wanted: str) -> None:
        faults.append(Fault(field=field, got=got, wanted=wanted))

    for file in config.weight_files:
        try:
            with safe_open(model_dir / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping: it has no iterator
                    if _is_ignored(name, config):
                        continue
                    if name not in shapes:
                        refuse(f"{file}: {name}", "an unknown tensor", "the tensors of the configuration")
                        continue
                    if name in found:
                        refuse(f"{file}: {name}", "a second copy", "each tensor once")
                        continue
                    entry = weights.get_slice(name)
                    shape, kind = tuple(entry.get_shape()), entry.get_dtype()
                    if shape != shapes[name]:
                        refuse(f"{file}: {name}", f"shape {shape}", f"shape {shapes[name]}")
                    elif kind not in FLOAT_DTYPES:
                        refuse(f"{file}: {name}", f"dtype {kind}", " or ".join(FLOAT_DTYPES))
                    else:
                        found[name] = weights.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            refuse(file, str(error)[:200], "a readable safetensors file")
    for name in shapes.keys() - found.keys():
        refuse(name, "no such tensor", f"shape {shapes[name]}")
    if faults:
        raise UnsupportedModel(model_dir, faults[:MAX_FAULTS_SHOWN])
    return found


def _is_ignored(name: str, config: BaseModel) -> bool:
    """Tensors that older files hold and that the configuration determines."""
    is_tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _random_tensors(config: BaseModel, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=dtype, device=device)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            tensors[name] = tensor.normal_(std=RANDOM_STD, generator=generator)
    return tensors


def _pack(config: BaseModel, tensors: Mapping[str, Tensor], device: torch.device | str) -> DecoderWeights:
    def take(name: str) -> Tensor:
        return tensors[name].to(device)

    embedding = take("model.embed_tokens.weight").contiguous()
    head = embedding if config.tie_word_embeddings else take("lm_head.weight")
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_pack_layer(config, take, layer) for layer in range(config.num_layers)),
        final_norm=take("model.norm.weight"),
        lm_head=head.t().contiguous(),
    )


def _pack_layer(config: BaseModel, take: Take, layer: int) -> LayerWeights:
    at = f"model.layers.{layer}"

    def packed(*paths: str) -> Tensor:
        """Weights side by side as one [in, sum of out]."""
        return torch.cat([take(f"{at}.{path}.weight") for path in paths]).t().contiguous()

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    bias = torch.cat([take(f"{at}.{path}.bias") for path in qkv]) if config.qkv_bias else None
    qk_norm: Tensor | None = None
    if config.qk_norm:
        q_norm, k_norm = take(f"{at}.self_attn.q_norm.weight"), take(f"{at}.self_attn.k_norm.weight")
        qk_norm = torch.cat((q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)))
    return LayerWeights(
        input_norm=take(f"{at}.input_layernorm.weight"),
        qkv=packed(*qkv),
        qkv_bias=bias,
        qk_norm=qk_norm,
        o=packed("self_attn.o_proj"),
        post_norm=take(f"{at}.post_attention_layernorm.weight"),
        gate_up=packed("mlp.gate_proj", "mlp.up_proj"),
        down=packed("mlp.down_proj"),
    )
