"""Read a PEFT `adapter_config.json` and say, per linear layer, whether it is adapted, at what rank and scale.

Owns PEFT's rules for names and patterns (as of PEFT 0.21) and which of its options are plain LoRA; every
other option is refused by name unless it is off. Knows module names, no tensors and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from medley.spec.errors import Fault
from medley.spec.strict_json import decode_strict, shown_name

MAX_CONFIG_BYTES = 256 << 10
MAX_RANK = 128
MAX_ALPHA = 2**24  # far above any in use; keeps the scale exact and finite in float32

_READ = {
    "bias",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "alpha_pattern",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Notes, how it was trained, or details of an option that has a switch of its own.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
Number = TypeVar("Number", int, float)

_LITERAL_PATTERN = re.compile(r"\^?(?:\\\.|[A-Za-z0-9_.])+")


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Plain LoRA. Module names are those inside the base model: `model.layers.0.self_attn.q_proj`.

    rank_pattern, alpha_pattern: dotted suffix (or `^` and the full name) -> value; the first that fits, wins.
    target_modules: dotted suffixes (None: all linear layers). layers: their indices (None: all).
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: frozenset[str] | None
    layers: frozenset[int] | None

    def is_target(self, module: str, layer: int) -> bool:
        """PEFT's `check_target_module_exists`: the layer counts only for what is not named in full."""
        if self.target_modules is None or module in self.target_modules:
            return True
        is_named = any(suffix in self.target_modules for suffix in dotted_suffixes(module))
        return is_named and (self.layers is None or layer in self.layers)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), after both patterns."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def dotted_suffixes(module: str) -> list[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _by_pattern(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """PEFT's `get_pattern_key`, for literal keys: the first key, in the file's order, that fits the name."""
    if not pattern:
        return default
    fitting = {f"^{module}", *dotted_suffixes(module)}
    return next((value for key, value in pattern.items() if key in fitting), default)


def parse_config(
    config_bytes: bytes, modules: Collection[str], num_layers: int
) -> tuple[LoraConfig | None, list[Fault]]:
    """The configuration and every fault. `modules`: full names of the linear layers of the base.

    A configuration comes back with faults where those are of options alone, so that its ranks and targets can
    still be held against the tensors; it is None where ranks or targets could not be read.
    """
    try:
        values = decode_strict(config_bytes, max_bytes=MAX_CONFIG_BYTES)
    except ValueError as error:
        return None, [Fault(field="adapter_config.json", got=str(error), wanted="one JSON object")]
    if not isinstance(values, dict):
        return None, [Fault(field="adapter_config.json", got=type(values).__name__, wanted="one JSON object")]
    parser = _Parser(values, modules, num_layers)
    config: LoraConfig | None = parser.config()
    if parser.faults:
        config = None
    parser.refuse_variants()
    return config, parser.faults


class _Parser:
    """One configuration being read; whatever is wrong becomes a fault and a harmless value stands in."""

    def __init__(self, values: Mapping[str, Any], modules: Collection[str], num_layers: int) -> None:
        self.values, self.num_layers = values, num_layers
        self.suffixes = {suffix for module in modules for suffix in dotted_suffixes(module)}
        self.full_names = {f"^{module}" for module in modules}
        self.faults: list[Fault] = []

    def refuse(self, key: str, got: object, wanted: str) -> None:
        self.faults.append(Fault(field=f"adapter_config.{key}", got=repr(got)[:120], wanted=wanted))

    def config(self) -> LoraConfig:
        return LoraConfig(
            rank=self._rank("r", self.values.get("r", 8)),
            alpha=self._alpha("lora_alpha", self.values.get("lora_alpha", 8)),
            use_rslora=self._flag("use_rslora"),
            rank_pattern={k: self._rank(f"rank_pattern.{k}", v) for k, v in self._pattern("rank_pattern")},
            alpha_pattern={k: self._alpha(f"alpha_pattern.{k}", v) for k, v in self._pattern("alpha_pattern")},
            target_modules=self._target_modules(),
            layers=self._layers(),
        )

    def refuse_variants(self) -> None:
        values = self.values
        if values.get("peft_type") != "LORA":
            self.refuse("peft_type", values.get("peft_type"), "'LORA'")
        if values.get("task_type") not in (None, "CAUSAL_LM"):
            self.refuse("task_type", values["task_type"], "'CAUSAL_LM'")
        if values.get("bias") not in (None, "none"):
            self.refuse("bias", values["bias"], "'none': an adapter changes linear layers by A and B alone")
        if values.get("init_lora_weights") not in _INITS_THAT_KEEP_THE_BASE:
            wanted = "an initialisation that leaves the base as it is; PEFT can convert the adapter when saving"
            self.refuse("init_lora_weights", values["init_lora_weights"], wanted)
        if values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            self.refuse("layers_pattern", values["layers_pattern"], "'layers'")
        for key in sorted(set(values) - _READ - _WITHOUT_EFFECT):
            if values[key] not in (None, False, [], {}, ""):
                self.refuse(shown_name(key), values[key], "null or off: only plain LoRA is run here")

    def _rank(self, key: str, value: object) -> int:
        if type(value) is int and 1 <= value <= MAX_RANK:
            return value
        self.refuse(key, value, f"a rank from 1 to {MAX_RANK}")
        return 1

    def _alpha(self, key: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_ALPHA:
            return value
        self.refuse(key, value, f"a number of at most {MAX_ALPHA}")
        return 1.0

    def _flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            self.refuse(key, value, "true or false")
        return value is True

    def _pattern(self, key: str) -> list[tuple[str, Any]]:
        """The entries of a pattern whose keys are names; other regular expressions are refused."""
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, dict):
            self.refuse(key, pattern, "an object of module names")
            return []
        found: dict[str, Any] = {}
        for name, value in pattern.items():
            literal = name.replace("\\.", ".")
            if not _LITERAL_PATTERN.fullmatch(name):
                self.refuse(key, name, "names of modules, no regular expressions")
            elif literal not in self.suffixes and literal not in self.full_names:
                self.refuse(key, name, "the name, or the end of the name, of a linear layer of the base")
            else:
                found.setdefault(literal, value)
        return list(found.items())

    def _target_modules(self) -> frozenset[str] | None:
        names = self.values.get("target_modules")
        if names == "all-linear":
            return None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            self.refuse("target_modules", names, "a list of names of linear layers, or 'all-linear'")
            return frozenset()
        for name in sorted(set(names) - self.suffixes):
            self.refuse("target_modules", name, "the name, or the end of the name, of a linear layer of the base")
        return frozenset(names)

    def _layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        layers = value if isinstance(value, list) else [value]
        if value is None or value == []:
            return None
        if not all(type(layer) is int and 0 <= layer < self.num_layers for layer in layers):
            self.refuse("layers_to_transform", value, f"layers from 0 to {self.num_layers - 1}")
            return None
        return frozenset(layers)
