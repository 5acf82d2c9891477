"""From a Hugging Face folder, or from a configuration alone, to a Decoder. Owns names and shapes of weights.

Reads safetensors and nothing else. Every tensor must be known, present once and of the shape the configuration
gives; all that is wrong is reported at once.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.spec.adapters import FLOAT_DTYPES
from medley.spec.base_models import BaseModel, UnsupportedModel, linear_sites, read_base_model
from medley.spec.errors import Fault
from medley_worker.models.decoder import Decoder, DecoderWeights, LayerWeights
from medley_worker.models.sharding import Shard, shard_of
from medley_worker.ops.memory import Memory, PlainMemory

LOAD_FORMATS = ("safetensors", "random")
RANDOM_STD = 0.02  # transformers' own initializer_range
MAX_FAULTS_SHOWN = 20


def load_model(
    model_dir: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_format: str = "safetensors",
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    memory: Memory | None = None,
) -> Decoder:
    """The model in a folder, on `device`, in `dtype`; of several ranks, the share of one, which `join`s the others.

    memory: where its weights lie on `device`; None: torch's own.

    load_format "random" makes weights from the configuration and `seed`, and reads no weight files.
    Raises UnsupportedModel with every fault of configuration or weights, ValueError for an unknown load_format or a
    number of ranks that does not divide the model.
    """
    model_dir = Path(model_dir)
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}, wanted one of {', '.join(LOAD_FORMATS)}")
    config = read_base_model(model_dir, need_weights=load_format == "safetensors")
    device = torch.device(device)
    shard = shard_of(config, rank, num_ranks)
    places = _Places(shard, dtype, PlainMemory(device) if memory is None else memory)
    if load_format == "random":
        _fill_randomly(places, shard, seed)
    else:
        _read_into(places, model_dir, shard)
    return Decoder(shard, places.pack())


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


class _Places:
    """Where each tensor of a model goes: one tensor a group of weights, known by its first, and views into it by name.

    So a weight is written once, where it stays: packing copies nothing on CUDA, and a layer at a time on CPU.
    """

    def __init__(self, shard: Shard, dtype: torch.dtype, memory: Memory) -> None:
        config = self._config = shard.part
        self._by_name: dict[str, Tensor] = {}
        self._groups: dict[str, Tensor] = {}  # by the name of the group's first tensor
        shapes = tensor_shapes(config)
        groups = [names for names in _groups(config) if shard.holds(names[0])]
        whole = [(sum(shapes[name][0] for name in names), *shapes[names[0]][1:]) for names in groups]
        blocks = memory.kept([math.prod(shape) * dtype.itemsize for shape in whole])
        for names, shape, block in zip(groups, whole, blocks, strict=True):
            flat = block.view(dtype)
            group = flat.view(shape[::-1]).t() if _is_row_major(names[0], flat.device) else flat.view(shape)
            self._groups[names[0]] = group
            self._by_name |= dict(zip(names, torch.split(group, [shapes[name][0] for name in names]), strict=True))
        self.dtype, self.device = group.dtype, group.device

    def __getitem__(self, name: str) -> Tensor:
        """Where the tensor `name` is to be written."""
        return self._by_name[name]

    def pack(self) -> DecoderWeights:
        """The weights, once all are written. Called once: it gives them away."""
        self._by_name.clear()
        layers = tuple(self._pack_layer(f"model.layers.{layer}") for layer in range(self._config.num_layers))
        embedding = self._groups.pop("model.embed_tokens.weight", None)
        if embedding is None:
            return DecoderWeights(None, layers, None, None)
        head = embedding if self._config.tie_word_embeddings else self._groups.pop("lm_head.weight")
        return DecoderWeights(embedding, layers, self._groups.pop("model.norm.weight"), _transposed(head))

    def _pack_layer(self, at: str) -> LayerWeights:
        config, take = self._config, self._groups.pop
        qk_norm: Tensor | None = None
        if config.qk_norm:
            q_norm, k_norm = take(f"{at}.self_attn.q_norm.weight"), take(f"{at}.self_attn.k_norm.weight")
            qk_norm = torch.cat((q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)))
        return LayerWeights(
            input_norm=take(f"{at}.input_layernorm.weight"),
            qkv=_transposed(take(f"{at}.self_attn.q_proj.weight")),
            qkv_bias=take(f"{at}.self_attn.q_proj.bias") if config.qkv_bias else None,
            qk_norm=qk_norm,
            o=_transposed(take(f"{at}.self_attn.o_proj.weight")),
            post_norm=take(f"{at}.post_attention_layernorm.weight"),
            gate_up=_transposed(take(f"{at}.mlp.gate_proj.weight")),
            down=_transposed(take(f"{at}.mlp.down_proj.weight")),
        )


def _groups(config: BaseModel) -> list[list[str]]:
    """Names of the tensors that lie side by side in one piece of memory, for each piece."""
    names = tensor_shapes(config)
    paths: dict[str, list[str]] = {}
    for site in linear_sites(config):
        paths.setdefault(site.group, []).append(site.path)
    groups: list[list[str]] = []
    for layer in range(config.num_layers):
        for members in paths.values():
            for kind in ("weight", "bias"):
                groups.append([f"model.layers.{layer}.{path}.{kind}" for path in members])
    together = [group for group in groups if group[0] in names]
    grouped = {name for group in together for name in group}
    return together + [[name] for name in names if name not in grouped]


# Linear weights that cuBLASLt reads faster as [in, out] row by row than as [out, in], by 1 to 10 % for 8 to 256 rows on
# an H200 (benchmarks/NOTES.md). The others it reads up to a half slower so.
ROW_MAJOR_ON_CUDA = ("q_proj.weight", "o_proj.weight", "down_proj.weight")


def _is_row_major(first: str, device: torch.device) -> bool:
    """Whether a group of tensors, known by its first, lies in memory as [in, out] row by row."""
    return device.type == "cuda" and first.endswith(ROW_MAJOR_ON_CUDA)


def _transposed(weight: Tensor) -> Tensor:
    """[in, out] of a weight [out, in]: a view on CUDA, row-major memory on CPU (`ops.linear` says why)."""
    return weight.t() if weight.device.type == "cuda" else weight.t().contiguous()


def _read_into(places: _Places, model_dir: Path, shard: Shard) -> None:
    """Every rank checks every tensor, so that all refuse what one refuses; each reads what it holds."""
    config = shard.whole
    shapes = tensor_shapes(config)
    found: set[str] = set()
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
                        found.add(name)
                        if shard.holds(name):
                            places[name].copy_(entry[shard.cut(name)])  # one tensor of the mapped file on the host
        except (SafetensorError, OSError) as error:
            refuse(file, str(error)[:200], "a readable safetensors file")
    for name in shapes.keys() - found:
        refuse(name, "no such tensor", f"shape {shapes[name]}")
    if faults:
        raise UnsupportedModel(model_dir, faults[:MAX_FAULTS_SHOWN])


def _is_ignored(name: str, config: BaseModel) -> bool:
    """Tensors that older files hold and that the configuration determines."""
    is_tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _fill_randomly(places: _Places, shard: Shard, seed: int) -> None:
    """Norms 1, biases 0, weights normal: in the order of `tensor_shapes`, which the generator's stream follows.

    Each rank draws every tensor whole and keeps its share, so that the model is the same on any number of ranks.
    """
    generator = torch.Generator(device=places.device).manual_seed(seed)
    for name, shape in tensor_shapes(shard.whole).items():
        is_held = shard.holds(name)
        if name.endswith("norm.weight"):
            if is_held:
                places[name].fill_(1)
        elif name.endswith(".bias"):
            if is_held:
                places[name].zero_()
        else:
            # Apart from where they go: how a tensor lies in memory decides which of its numbers is drawn when.
            whole = torch.empty(shape, dtype=places.dtype, device=places.device)
            whole.normal_(std=RANDOM_STD, generator=generator)
            if is_held:
                places[name].copy_(whole if places[name].shape == shape else whole[shard.cut(name)])
