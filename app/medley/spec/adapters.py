"""Read an adapter against its base: PEFT configuration and safetensors header, exact to the last tensor.

Owns which tensors an adapter must have and may have. An adapter is accepted whole or refused with every
reason at once. Reads no weights (`medley.spec.intake` looks at the values); knows nothing of tenants or torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from medley.spec.base_models import BaseModel, LinearSite, linear_sites
from medley.spec.errors import Fault
from medley.spec.peft_config import MAX_CONFIG_BYTES, parse_config
from medley.spec.safetensors_header import HeaderError, SafetensorsHeader, limited, read_header
from medley.spec.strict_json import shown_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
FLOAT_DTYPES = ("F32", "F16", "BF16")

Modules = Mapping[str, tuple[int, LinearSite]]  # full name -> layer and site


class AdapterRefused(ValueError):
    """An adapter that cannot be used with the base; `faults` has every reason found."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("the adapter is refused: " + "; ".join(map(str, self.faults)))


class AdapterTarget(msgspec.Struct, frozen=True):
    """One adapted linear layer: y += scale * (x @ A.T) @ B.T, A [rank, in_features], B [out_features, rank].

    site: `q_proj`, `k_proj`, ... `down_proj`. a_name, b_name: the tensors' names in the weights file.
    """

    layer: int
    site: str
    rank: int
    scale: float
    a_name: str
    b_name: str


class AdapterHeader(msgspec.Struct, frozen=True):
    """What an adapter changes, ordered by layer and then by site in the order of the forward pass.

    dtype: `F32`, `F16` or `BF16`, the same for all tensors. size_bytes: of the weights file.
    """

    targets: tuple[AdapterTarget, ...]
    max_rank: int
    dtype: str
    size_bytes: int


def read_adapter(adapter_dir: Path, base: BaseModel) -> AdapterHeader:
    """The adapter in a folder as PEFT saves it. Raises AdapterRefused with all faults, and OSError."""
    faults: list[Fault] = []
    config_bytes = _read_config(adapter_dir / CONFIG_NAME, faults)
    header = _read_weights_header(adapter_dir, faults)
    adapter: AdapterHeader | None = None
    if config_bytes is not None:
        adapter, found = check_adapter(config_bytes, header, base)
        faults += found
    if faults or adapter is None:
        raise AdapterRefused(faults)
    return adapter


def check_adapter(
    config_bytes: bytes, header: SafetensorsHeader | None, base: BaseModel
) -> tuple[AdapterHeader | None, list[Fault]]:
    """(adapter, []) or (None, every fault). No header (it was refused): the configuration alone."""
    modules = {
        f"model.layers.{layer}.{site.path}": (layer, site)
        for layer in range(base.num_layers)
        for site in linear_sites(base)
    }
    config, faults = parse_config(config_bytes, modules, base.num_layers)
    if header is None:
        return None, faults
    faults += _check_tensors(header, modules)
    targets: list[AdapterTarget] = []
    if config is not None:
        targets = [
            AdapterTarget(layer, site.name, config.rank_of(module), config.scale_of(module), *_tensor_names(module))
            for module, (layer, site) in modules.items()
            if config.is_target(module, layer)
        ]
        faults += _check_targets(targets, header, modules)
    if faults:
        return None, limited(faults)
    max_rank = max(target.rank for target in targets)
    dtype = next(iter(header.tensors.values())).dtype
    return AdapterHeader(tuple(targets), max_rank, dtype, header.data_start + header.data_bytes), []


def _tensor_names(module: str) -> tuple[str, str]:
    """The names under which PEFT saves A and B: its own two wrappers, then the module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _tensor_fault(name: str, got: str, wanted: str) -> Fault:
    return Fault(field=f"{WEIGHTS_NAME}: {shown_name(name)}", got=got, wanted=wanted)


def _check_tensors(header: SafetensorsHeader, modules: Modules) -> list[Fault]:
    """What must hold whatever the configuration says: known names, floats of one kind, halves that fit the base."""
    features: dict[str, int] = {}  # of each known tensor: its extent on the side that is not the rank
    faults: list[Fault] = []
    for module, (_, site) in modules.items():
        a_name, b_name = _tensor_names(module)
        features |= {a_name: site.in_features, b_name: site.out_features}
        for name, other in ((a_name, b_name), (b_name, a_name)):
            if name in header.tensors and other not in header.tensors:
                faults.append(_tensor_fault(other, "no such tensor", f"the other half of {name}"))
    for name, info in header.tensors.items():
        if name not in features:
            got = "a tensor that is no half of a linear layer"
            faults.append(_tensor_fault(name, got, "lora_A and lora_B weights alone"))
        elif len(info.shape) != 2 or info.shape[1 - _rank_axis(name)] != features[name]:
            shape = ["rank", features[name]] if _rank_axis(name) == 0 else [features[name], "rank"]
            faults.append(_tensor_fault(name, f"shape {list(info.shape)}", f"[{shape[0]}, {shape[1]}]"))
        if info.dtype not in FLOAT_DTYPES:
            faults.append(_tensor_fault(name, info.dtype, " or ".join(FLOAT_DTYPES)))
    dtypes = {info.dtype for info in header.tensors.values()}
    if len(dtypes) > 1 and dtypes <= set(FLOAT_DTYPES):
        faults.append(Fault(field=WEIGHTS_NAME, got=", ".join(sorted(dtypes)), wanted="one dtype for all tensors"))
    return faults


def _rank_axis(name: str) -> int:
    """A is [rank, in_features], B is [out_features, rank]."""
    return 0 if name.endswith(".lora_A.weight") else 1


def _check_targets(targets: list[AdapterTarget], header: SafetensorsHeader, modules: Modules) -> list[Fault]:
    """Tensors against the configuration: each layer it names is there at its rank, and no other layer is."""
    faults: list[Fault] = []
    if not targets:
        faults.append(Fault(field=CONFIG_NAME, got="no linear layer", wanted="at least one that it changes"))
    for target in targets:
        halves = {name: header.tensors.get(name) for name in (target.a_name, target.b_name)}
        if not any(halves.values()):
            wanted = "both halves of each layer that the configuration names"
            faults.append(_tensor_fault(target.a_name, "no such tensor, nor its lora_B", wanted))
        for name, info in halves.items():
            if info is not None and len(info.shape) == 2 and info.shape[_rank_axis(name)] != target.rank:
                got, wanted = f"rank {info.shape[_rank_axis(name)]}", f"rank {target.rank}, by the configuration"
                faults.append(_tensor_fault(name, got, wanted))
    named = {name for target in targets for name in (target.a_name, target.b_name)}
    # PEFT would drop these without a word, and the adapter would not be the one that was trained.
    for name in (name for module in modules for name in _tensor_names(module)):
        if name in header.tensors and name not in named:
            got = "a layer that the configuration leaves out"
            faults.append(_tensor_fault(name, got, "tensors of its target_modules alone"))
    return faults


def _read_config(path: Path, faults: list[Fault]) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        faults.append(Fault(field=CONFIG_NAME, got="no such file", wanted="the configuration PEFT saved"))
        return None


def _read_weights_header(adapter_dir: Path, faults: list[Fault]) -> SafetensorsHeader | None:
    try:
        with (adapter_dir / WEIGHTS_NAME).open("rb") as file:
            return read_header(file, size_bytes=os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        pickles = [name for name in PICKLE_NAMES if (adapter_dir / name).exists()]
        got = f"a pickle ({pickles[0]})" if pickles else "no such file"
        faults.append(Fault(field=WEIGHTS_NAME, got=got, wanted="weights saved as safetensors"))
    except HeaderError as error:
        faults += error.faults
    return None
