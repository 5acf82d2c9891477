"""Read the header of a safetensors file that a stranger wrote: which tensor lies where, and nothing else.

Knows the format, not what the tensors are for. Every range is checked against the file's size before anybody
reads it; a header that two readers could understand differently is refused. Format: 8 bytes little-endian
header length, that much JSON, then the data section, which the tensors tile without gap or overlap.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

import msgspec

from medley.spec.errors import Fault
from medley.spec.strict_json import decode_strict, shown_name

MAX_HEADER_BYTES = 16 << 20
MAX_DIMS = 8
MAX_SHOWN_FAULTS = 50  # a wrong file is wrong in each tensor; the first ones tell
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class HeaderError(ValueError):
    """A safetensors header that cannot be trusted; `faults` has every reason found."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(map(str, self.faults)))


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor: safetensors' dtype name, its shape, and its bytes [begin, end) inside the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(msgspec.Struct, frozen=True):
    """Tensors in the order of their data, which is bytes [data_start, data_start + data_bytes) of the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    data_bytes: int


def limited(faults: list[Fault]) -> list[Fault]:
    """The first MAX_SHOWN_FAULTS, and how many more there are."""
    if len(faults) <= MAX_SHOWN_FAULTS:
        return faults
    rest = f"{len(faults) - MAX_SHOWN_FAULTS} more faults"
    return [*faults[:MAX_SHOWN_FAULTS], Fault(field="and", got=rest, wanted="none")]


def read_header(file: BinaryIO, *, size_bytes: int, max_bytes: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """The header of `file`, which stands at its beginning. Reads at most `max_bytes` + 8 bytes.

    size_bytes: the file's size; the tensors must fill it exactly. max_bytes: of the header, which takes some twenty
    times as much memory. Raises HeaderError with all faults.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise HeaderError([_fault("header", f"a file of {len(prefix)} bytes", "8 bytes of header length")])
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > max_bytes:
        raise HeaderError([_fault("header", f"{header_bytes} bytes", f"at most {max_bytes} bytes")])
    text = file.read(header_bytes)
    if len(text) < header_bytes or 8 + header_bytes > size_bytes:
        raise HeaderError([_fault("header", f"{len(text)} of {header_bytes} bytes", "a file that is not cut off")])
    if not text.startswith(b"{"):
        raise HeaderError([_fault("header", repr(text[:8]), "a JSON object that starts at once")])
    try:
        entries = decode_strict(text, max_bytes=max_bytes)
    except ValueError as error:
        raise HeaderError([_fault("header", str(error), "one JSON object")]) from None
    return _check_entries(entries, 8 + header_bytes, size_bytes - 8 - header_bytes)


def _check_entries(entries: dict[str, Any], data_start: int, data_bytes: int) -> SafetensorsHeader:
    faults: list[Fault] = []
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append(_fault("__metadata__", repr(metadata)[:80], "an object of strings"))
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info = _read_entry(name, entry, data_bytes, faults)
        if info is not None:
            tensors[name] = info
    if not faults:  # ranges can be laid side by side only when each is sound
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_tiling(tensors, data_bytes, faults)
    if faults:
        raise HeaderError(limited(faults))
    return SafetensorsHeader(tensors, metadata, data_start, data_bytes)


def _read_entry(name: str, entry: object, data_bytes: int, faults: list[Fault]) -> TensorInfo | None:
    at, num_before = shown_name(name), len(faults)
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        faults.append(_fault(at, repr(entry)[:80], "an object of dtype, shape and data_offsets"))
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        faults.append(_fault(at, f"dtype {repr(dtype)[:40]}", f"one of {', '.join(DTYPE_BYTES)}"))
    if not _is_lengths(shape) or len(shape) > MAX_DIMS:
        faults.append(_fault(at, f"shape {repr(shape)[:80]}", f"at most {MAX_DIMS} whole numbers of 0 or more"))
    if not _is_lengths(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > data_bytes:
        wanted = f"begin and end, in order, within the {data_bytes} bytes of data"
        faults.append(_fault(at, f"data_offsets {repr(offsets)[:80]}", wanted))
    if len(faults) > num_before:
        return None
    begin, end = offsets
    need_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != need_bytes:
        wanted = f"{need_bytes} for {dtype} {shape}" if need_bytes < 2**63 else "a shape that fits the file"
        faults.append(_fault(at, f"{end - begin} bytes", wanted))
        return None
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_tiling(tensors: dict[str, TensorInfo], data_bytes: int, faults: list[Fault]) -> None:
    at_byte = 0
    for name, info in tensors.items():
        if info.begin != at_byte:
            kind = "overlaps the tensor before it" if info.begin < at_byte else "leaves a gap before it"
            faults.append(_fault(shown_name(name), f"begin {info.begin}, which {kind}", f"begin {at_byte}"))
        at_byte = max(at_byte, info.end)
    if at_byte != data_bytes:
        faults.append(_fault("data", f"{data_bytes} bytes after the header", f"{at_byte}, where the last tensor ends"))


def _is_lengths(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _fault(at: str, got: str, wanted: str) -> Fault:
    return Fault(field=f"safetensors: {at}", got=got, wanted=wanted)
