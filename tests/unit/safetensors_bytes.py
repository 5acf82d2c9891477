"""Safetensors files as bytes, sound or broken on purpose, without any library that would refuse to write them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}


def framed(header: bytes, data: bytes = b"") -> bytes:
    """Length, header text as given, data."""
    return struct.pack("<Q", len(header)) + header + data


def safetensors(tensors: Mapping[str, tuple[str, list[int]]], data: bytes | None = None) -> bytes:
    """A sound file of `name: (dtype, shape)`, of zeros unless `data` is given."""
    entries: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + FLOAT_BYTES[dtype]
        for extent in shape:
            end = at + (end - at) * extent
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return framed(json.dumps(entries).encode(), bytes(at) if data is None else data)
