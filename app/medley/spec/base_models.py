"""Read a base model's folder: `config.json`, `generation_config.json` and which files hold the weights.

Owns what a decoder's numbers mean and which of them Medley can run; what it does not know it refuses by name,
all reasons at once. Reads no weights and knows nothing of torch, devices or serving.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from medley.spec.errors import Fault
from medley.spec.fields import Fields, read_object

MAX_CONFIG_BYTES = 1 << 20  # published configurations are a few KB
MAX_INDEX_BYTES = 64 << 20  # about 100 bytes a tensor
MAX_LAYERS = 1024  # eight times the deepest decoder published

Group = Literal["qkv", "o", "gate_up", "down"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What transformers' own config classes take for a key that the file leaves out.
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_QWEN_DEFAULTS = {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128},
}
_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}
_LLAMA3_KEYS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


# Other decoders' keys. transformers skips them for these four; a file that has them means another forward pass.
_FOREIGN = {
    "attn_logit_softcapping",
    "attention_chunk_size",
    "attention_multiplier",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "use_qk_norm",
}


class UnsupportedModel(ValueError):
    """A base model that Medley cannot run; `faults` has every reason found."""

    def __init__(self, model_dir: Path, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"cannot use the base model {model_dir}: " + "; ".join(map(str, self.faults)))


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Llama 3.1's rope scaling, the only kind there is here. Lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's shape, as the model's own configuration gives it.

    layer_windows: per layer, how many tokens a token sees, itself included (None: all before it).
    qkv_bias: q, k and v projections add a bias; no other linear layer ever does.
    qk_norm: RMSNorm over each head of q and k, before rope.
    eos_token_ids: every token that ends a text (generation_config.json, else config.json), ascending.
    weight_files: safetensors files in the folder, in order; empty where weights were not asked for.
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    weight_files: tuple[str, ...]

    @property
    def sliding_window(self) -> int | None:
        """The window of those layers that have one (they all share it), or None."""
        return next((window for window in self.layer_windows if window is not None), None)


class LinearSite(msgspec.Struct, frozen=True):
    """A linear layer that each decoder layer has once and that an adapter may change.

    path: its module path below `model.layers.<i>.`. group: which sites share one input and one launch.
    """

    name: str
    path: str
    in_features: int
    out_features: int
    group: Group


def linear_sites(model: BaseModel) -> tuple[LinearSite, ...]:
    """The seven linear layers of one decoder layer, in the order of the forward pass."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_out, kv_out = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (
        LinearSite("q_proj", "self_attn.q_proj", hidden, q_out, "qkv"),
        LinearSite("k_proj", "self_attn.k_proj", hidden, kv_out, "qkv"),
        LinearSite("v_proj", "self_attn.v_proj", hidden, kv_out, "qkv"),
        LinearSite("o_proj", "self_attn.o_proj", q_out, hidden, "o"),
        LinearSite("gate_proj", "mlp.gate_proj", hidden, inner, "gate_up"),
        LinearSite("up_proj", "mlp.up_proj", hidden, inner, "gate_up"),
        LinearSite("down_proj", "mlp.down_proj", inner, hidden, "down"),
    )


def read_base_model(model_dir: Path, *, need_weights: bool = True) -> BaseModel:
    """The model in a Hugging Face folder. Raises UnsupportedModel with all reasons.

    need_weights: False reads the configuration alone (random weights), and `weight_files` is empty.
    """
    faults: list[Fault] = []
    config = read_object(model_dir / "config.json", MAX_CONFIG_BYTES, faults)
    generation_path = model_dir / "generation_config.json"
    generation = read_object(generation_path, MAX_CONFIG_BYTES, faults) if generation_path.exists() else {}
    if config is None or generation is None:
        raise UnsupportedModel(model_dir, faults)
    weight_files = _weight_files(model_dir, faults) if need_weights else ()
    model = _interpret(config, generation, weight_files, faults)
    if faults or model is None:
        raise UnsupportedModel(model_dir, faults)
    return model


def _interpret(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    weight_files: tuple[str, ...],
    faults: list[Fault],
) -> BaseModel | None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        faults.append(Fault(field="model_type", got=repr(model_type)[:80], wanted=f"one of {known}"))
        return None
    fields = Fields(config, _COMMON_DEFAULTS | _DEFAULTS[model_type], faults)
    _refuse_variants(fields, model_type)
    num_layers = fields.extent("num_hidden_layers", limit=MAX_LAYERS)
    num_heads = fields.extent("num_attention_heads")
    hidden_size, vocab_size = fields.extent("hidden_size"), fields.extent("vocab_size")
    num_kv_heads = fields.extent("num_key_value_heads", default=num_heads)
    head_dim = fields.extent("head_dim", default=max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}), or head_dim")
    if head_dim % 2:
        faults.append(Fault(field="head_dim", got=str(head_dim), wanted="an even number, for rope"))
    max_model_len = fields.extent("max_position_embeddings")
    rope_theta, rope_scaling = _rope(fields, max_model_len)
    return BaseModel(
        architecture=ARCHITECTURES[model_type],
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.extent("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        rms_norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        layer_windows=_layer_windows(fields, model_type, num_layers),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        bos_token_id=_token_id(fields, "bos_token_id", vocab_size),
        weight_files=weight_files,
    )


def _refuse_variants(fields: Fields, model_type: str) -> None:
    """What changes the arithmetic in a way that the decoders here do not compute."""
    architectures = fields.get("architectures")
    if architectures not in (None, [], [ARCHITECTURES[model_type]]):
        fields.refuse("architectures", f"[{ARCHITECTURES[model_type]!r}]")
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        got = f"quantised weights (quant_method {str(method)[:40]!r})"
        fault = Fault(field="quantization_config", got=got, wanted="plain float32, float16 or bfloat16 weights")
        fields.faults.append(fault)
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("partial_rotary_factor", 1, 1.0)
    for key in sorted(_FOREIGN & set(fields.values)):
        fields.only(key, False, 0)


def _rope(fields: Fields, max_model_len: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    The order in which they count is that of transformers' `convert_rope_params_to_dict`.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(name) or {}
    if not isinstance(given, dict):
        fields.refuse(name, "an object")
        return 1.0, None
    rope = Fields(given, {}, [])
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.positive("rope_theta", default=fields.positive("rope_theta", default=10_000.0))
    scaling: RopeScaling | None = None
    known = _ROPE_KEYS
    if kind == "llama3":
        known = _ROPE_KEYS | _LLAMA3_KEYS
        inside = rope.extent("original_max_position_embeddings", default=max_model_len)
        scaling = RopeScaling(
            factor=rope.positive("factor"),
            low_freq_factor=rope.positive("low_freq_factor"),
            high_freq_factor=rope.positive("high_freq_factor"),
            original_max_len=fields.extent("original_max_position_embeddings", default=inside),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            rope.refuse("high_freq_factor", "more than low_freq_factor")
    elif kind != "default":
        rope.faults.append(Fault(field="rope_type", got=repr(kind)[:80], wanted="'default' or 'llama3'"))
        known = _ROPE_KEYS | set(given)
    for key in sorted(set(given) - known):
        rope.refuse(key, f"no such key for rope type {kind!r}")
    fields.faults += [msgspec.structs.replace(fault, field=f"{name}.{fault.field}") for fault in rope.faults]
    return theta, scaling


def _layer_windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: `layer_types`, else from `max_window_layers` on."""
    every_layer_full = (None,) * num_layers
    is_qwen = model_type in ("qwen2", "qwen3")
    if model_type == "llama" or (is_qwen and not fields.flag("use_sliding_window")):
        fields.only("layer_types", ["full_attention"] * num_layers)
        return every_layer_full
    if fields.get("sliding_window") is None:
        fields.only("layer_types", ["full_attention"] * num_layers)
        return every_layer_full
    window = fields.extent("sliding_window")
    layer_types = fields.get("layer_types")
    if not is_qwen:
        fields.only("layer_types", ["sliding_attention"] * num_layers)
        return (window,) * num_layers
    if layer_types is None:
        first = fields.values.get("max_window_layers", 28)
        if type(first) is not int:
            fields.refuse("max_window_layers", "a whole number")
            return every_layer_full
        return tuple(window if layer >= first else None for layer in range(num_layers))
    kinds = {"full_attention": None, "sliding_attention": window}
    is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not is_list or not all(isinstance(kind, str) and kind in kinds for kind in layer_types):
        fields.refuse("layer_types", f"{num_layers} of {' or '.join(kinds)}")
        return every_layer_full
    return tuple(kinds[kind] for kind in layer_types)


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.get(key)
    if name is None:
        return "float32"
    if name not in _DTYPES:
        fields.refuse(key, " or ".join(_DTYPES))
        return "float32"
    return str(name)


def _token_id(fields: Fields, key: str, vocab_size: int) -> int | None:
    value = fields.get(key)
    if value is None or (type(value) is int and 0 <= value < vocab_size):
        return value
    fields.refuse(key, f"a token id below {vocab_size}, or null")
    return None


def _eos_token_ids(fields: Fields, generation: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = fields.get("eos_token_id")
    if ids is None:
        return ()
    many = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < vocab_size for i in many):
        got = repr(ids)[:80]
        fields.faults.append(Fault(field="eos_token_id", got=got, wanted=f"token ids below {vocab_size}"))
        return ()
    return tuple(sorted(set(many)))


def _weight_files(model_dir: Path, faults: list[Fault]) -> tuple[str, ...]:
    if (model_dir / "model.safetensors").is_file():
        return ("model.safetensors",)
    index_path = model_dir / "model.safetensors.index.json"
    if not index_path.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern))
        got = f"pickles only ({', '.join(pickles[:4])})" if pickles else "no weight files"
        faults.append(Fault(field="weights", got=got, wanted="model.safetensors, or shards with their index"))
        return ()
    index = read_object(index_path, MAX_INDEX_BYTES, faults)
    if index is None:
        return ()
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        faults.append(Fault(field=f"{index_path.name}: weight_map", got=repr(weight_map)[:80], wanted="tensor: file"))
        return ()
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A plain name: the index must not lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            faults.append(Fault(field=index_path.name, got=name[:80], wanted="names of safetensors files beside it"))
        elif not (model_dir / name).is_file():
            faults.append(Fault(field=index_path.name, got=f"{name} is missing", wanted="every shard in the folder"))
    return tuple(names)
