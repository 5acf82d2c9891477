"""Judge an uploaded adapter's two files: configuration, header and every value, all reasons in one answer.

Owns the look at the values: NaN and infinity are refused, because one of them spoils each row of a batch it
touches. Constant memory whatever the file's size. Knows nothing of tenants, storage or torch.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import BinaryIO

from medley.spec.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterHeader,
    AdapterRefused,
    check_adapter,
    read_adapter,
)
from medley.spec.base_models import BaseModel, linear_sites
from medley.spec.errors import Fault
from medley.spec.peft_config import MAX_CONFIG_BYTES, MAX_RANK
from medley.spec.safetensors_header import MAX_HEADER_BYTES, HeaderError, SafetensorsHeader, limited, read_header
from medley.spec.strict_json import shown_name

TENSOR_HEADER_BYTES = 512  # of one tensor's entry in the header, its name among them, with room to spare
METADATA_BYTES = 64 << 10  # of what else stands in a header
CHUNK_BYTES = 64 << 10  # with its masks it fits a core's cache (550 MiB/s); whole lanes of each dtype

# dtype -> (bytes of a lane, its exponent's bits, the lowest of them). NaN and infinity: all exponent bits are set.
_EXPONENTS = {"F32": (4, 0x7F80_0000, 0x0080_0000), "F16": (2, 0x7C00, 0x0400), "BF16": (2, 0x7F80, 0x0080)}


def max_weights_bytes(base: BaseModel) -> int:
    """The largest weights file that an adapter of `base` can have: each layer at the largest rank, in float32."""
    per_layer = sum((site.in_features + site.out_features) * MAX_RANK for site in linear_sites(base))
    return 4 * per_layer * base.num_layers + 8 + max_header_bytes(base)


def max_header_bytes(base: BaseModel) -> int:
    """The longest header that the weights file of an adapter of `base` can have."""
    num_tensors = 2 * len(linear_sites(base)) * base.num_layers
    return min(TENSOR_HEADER_BYTES * num_tensors + METADATA_BYTES, MAX_HEADER_BYTES)


def check_upload(config_bytes: bytes, weights: BinaryIO, base: BaseModel) -> tuple[AdapterHeader | None, list[Fault]]:
    """(adapter, []) or (None, every fault) for two uploaded files; `weights` is seekable and read from its start.
    Raises EOFError where the file shrinks while it is read.

    The values are looked at whenever the header can be trusted, so that one answer names everything.
    """
    size_bytes = weights.seek(0, os.SEEK_END)
    weights.seek(0)
    try:
        header = read_header(weights, size_bytes=size_bytes, max_bytes=max_header_bytes(base))
    except HeaderError as error:
        _, faults = check_adapter(config_bytes, None, base)
        return None, limited([*faults, *error.faults])
    adapter, faults = check_adapter(config_bytes, header, base)
    faults = limited([*faults, *check_finite(weights, header)])
    return (None, faults) if faults else (adapter, [])


def check_folder(adapter_dir: Path, base: BaseModel) -> AdapterHeader:
    """As `check_upload`, for an adapter in a folder. Raises AdapterRefused with all faults, and OSError."""
    config_path, weights_path = adapter_dir / CONFIG_NAME, adapter_dir / WEIGHTS_NAME
    if not (config_path.exists() and weights_path.exists()):
        return read_adapter(adapter_dir, base)  # says what is missing
    with config_path.open("rb") as config, weights_path.open("rb") as weights:
        adapter, faults = check_upload(config.read(MAX_CONFIG_BYTES + 1), weights, base)
    if adapter is None:
        raise AdapterRefused(faults)
    return adapter


def check_finite(weights: BinaryIO, header: SafetensorsHeader) -> list[Fault]:
    """A fault for each F32, F16 or BF16 tensor that holds a NaN or an infinity. Other dtypes are passed over."""
    faults: list[Fault] = []
    for name, info in header.tensors.items():
        if info.dtype not in _EXPONENTS:
            continue
        weights.seek(header.data_start + info.begin)
        if not _is_finite(weights, info.end - info.begin, info.dtype):
            at = f"{WEIGHTS_NAME}: {shown_name(name)}"
            faults.append(Fault(field=at, got="NaN or infinity", wanted="finite values alone"))
    return faults


def _is_finite(file: BinaryIO, num_bytes: int, dtype: str) -> bool:
    """Looks at all lanes of a chunk at once, as one long integer: the control plane has no array library.

    A lane's exponent bits plus the lowest of them carry into the sign's place only when all are set, and never
    beyond it, so lanes do not disturb each other.
    """
    exponents, lowest, signs = _masks(dtype)
    while num_bytes > 0:
        chunk = file.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise EOFError(f"the weights were cut off while they were read, {num_bytes} bytes before a tensor's end")
        num_bytes -= len(chunk)
        if ((int.from_bytes(chunk, "little") & exponents) + lowest) & signs:
            return False
    return True


@cache
def _masks(dtype: str) -> tuple[int, int, int]:
    """Exponent bits, lowest exponent bit and sign bit of each lane of a chunk."""
    lane_bytes, exponent, lowest = _EXPONENTS[dtype]
    sign = 1 << (8 * lane_bytes - 1)
    exponents, lows, signs = (
        int.from_bytes(bits.to_bytes(lane_bytes, "little") * (CHUNK_BYTES // lane_bytes), "little")
        for bits in (exponent, lowest, sign)
    )
    return exponents, lows, signs
