"""The library built from csrc, as typed functions over addresses: structures, loading, errors. No tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

import numpy as np
import torch

from medley_worker.ops.build import library

MAX_SITES, MAX_TILES = 3, 16
MODES = {"ring": 0, "bulk": 1}
HEADER = 8  # numbers before a group's items
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_ABI = 4
_ERROR_BYTES = 512

# MedleyItem of csrc/medley.h.
ITEM = np.dtype(
    [
        ("row_start", np.int32),
        ("num_rows", np.int32),
        ("num_tiles", np.int32),
        ("site_mask", np.int32),
        ("scales", np.int64),
        ("tiles", np.int64, (MAX_TILES,)),
    ]
)


class KernelError(RuntimeError):
    """A kernel refused its arguments or could not be launched."""


class Group(ctypes.Structure):
    """MedleyGroup of csrc/medley.h."""

    _fields_ = (
        ("in_features", c_int32),
        ("num_sites", c_int32),
        ("out_features", c_int32 * MAX_SITES),
        ("first_site", c_int32),
        ("model_sites", c_int32),
        ("num_layers", c_int32),
    )


class Call(ctypes.Structure):
    """MedleyCall of csrc/medley.h."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("items", c_void_p),
        ("header", c_void_p),
        ("max_items", c_int32),
        ("layer", c_int32),
        ("dtype", c_int32),
        ("block_rows", c_int32),
        ("mode", c_int32),
        ("pdl", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
    )


class Kernels:
    """The loaded library."""

    def __init__(self, path: str) -> None:
        handle = ctypes.CDLL(path)
        found = handle.medley_abi()
        if found != _ABI:
            raise KernelError(f"{path}: got ABI {found}, wanted {_ABI}")
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        error = (c_char_p, c_int64)
        self._sgmv = handle.medley_sgmv
        self._sgmv.argtypes = (POINTER(Group), POINTER(Call), c_void_p, *error)
        self._workspace = handle.medley_sgmv_workspace
        self._workspace.argtypes, self._workspace.restype = (POINTER(Group), c_int32, c_int32, c_int32), c_int64
        self._room = handle.medley_sgmv_room
        self._room.argtypes = (POINTER(Group), c_int32, c_int32, POINTER(c_int32), POINTER(c_int32), *error)
        self._greedy = handle.medley_greedy
        self._greedy.argtypes = (
            c_void_p,
            c_int64,
            c_int64,
            c_void_p,
            c_void_p,
            c_void_p,
            c_void_p,
            c_void_p,
            c_void_p,
            *error,
        )
        self._granularity = handle.medley_memory_granularity
        self._granularity.argtypes = (c_int32, POINTER(c_int64), *error)
        self._reserve = handle.medley_memory_reserve
        self._reserve.argtypes = (c_int64, POINTER(c_uint64), *error)
        self._release = handle.medley_memory_release
        self._release.argtypes = (c_uint64, c_int64, *error)
        self._map = handle.medley_memory_map
        self._map.argtypes = (c_int32, c_uint64, c_int64, POINTER(c_uint64), *error)
        self._unmap = handle.medley_memory_unmap
        self._unmap.argtypes = (c_uint64, c_int64, c_uint64, *error)

    def sgmv(self, group: Group, call: Call, stream: int) -> None:
        """Launch on `stream`. Raises KernelError naming the argument that is wrong."""
        self._check(self._sgmv(byref(group), byref(call), stream, self._error, _ERROR_BYTES))

    def workspace_bytes(self, group: Group, max_items: int, block_rows: int, mode: int) -> int:
        return int(self._workspace(byref(group), max_items, block_rows, mode))

    def room(self, group: Group, block_rows: int, mode: int) -> tuple[int, int]:
        """(Parts of items that the current device works on at once, column blocks that a part should hold)."""
        parts, column_blocks = c_int32(), c_int32()
        self._check(
            self._room(byref(group), block_rows, mode, byref(parts), byref(column_blocks), self._error, _ERROR_BYTES)
        )
        return parts.value, column_blocks.value

    def greedy(
        self,
        logits: int,
        num_rows: int,
        vocab_size: int,
        tokens: int,
        logprobs: int,
        is_bad: int,
        row_map: int | None,
        last_token: int | None,
        stream: int,
    ) -> None:
        """Addresses of device memory, as csrc/medley.h has them. Raises KernelError."""
        self._check(
            self._greedy(
                logits,
                num_rows,
                vocab_size,
                tokens,
                logprobs,
                is_bad,
                row_map,
                last_token,
                stream,
                self._error,
                _ERROR_BYTES,
            )
        )

    def granularity(self, device_index: int) -> int:
        """Of the device's virtual memory, in bytes; 0 where it has none."""
        found = c_int64()
        self._check(self._granularity(device_index, byref(found), self._error, _ERROR_BYTES))
        return found.value

    def reserve(self, num_bytes: int) -> int:
        """An address with `num_bytes` behind it, without memory. Raises KernelError."""
        address = c_uint64()
        self._check(self._reserve(num_bytes, byref(address), self._error, _ERROR_BYTES))
        return address.value

    def release(self, address: int, num_bytes: int) -> None:
        """The end of what `reserve` gave; nothing is mapped there any more. Raises KernelError."""
        self._check(self._release(address, num_bytes, self._error, _ERROR_BYTES))

    def map(self, device_index: int, address: int, num_bytes: int) -> int:
        """Put memory at reserved addresses, all or nothing. Returns its handle. Raises KernelError."""
        handle = c_uint64()
        self._check(self._map(device_index, address, num_bytes, byref(handle), self._error, _ERROR_BYTES))
        return handle.value

    def unmap(self, address: int, num_bytes: int, handle: int) -> None:
        """Give back what `map` put there, as a whole. Nothing that runs uses it. Raises KernelError."""
        self._check(self._unmap(address, num_bytes, handle, self._error, _ERROR_BYTES))

    def _check(self, code: int) -> None:
        if code:
            raise KernelError(self._error.value.decode(errors="replace"))


@cache
def kernels(device_index: int) -> Kernels:
    """The library for a CUDA device; built at first use where it is not there. Raises BuildFailed, KernelError."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return Kernels(str(library(f"{major}{minor}")))
