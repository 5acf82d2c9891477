"""How much of a CUDA device this process holds: tensors by their owners' word, the rest by what the device tells.

The rest is the device's context, kernels and captured graphs. Only the whole device can be asked, so the rest is
measured once, when an engine has been built, as what the device lost meanwhile beyond its tensors.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from medley_worker.ops.memory import Memory, PlainMemory

_NVML = "libnvidia-ml.so.1"


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64))


def _used_bytes(device: torch.device) -> int | None:
    """What all processes hold of a device, asked without a context on it; None where there is no such answer."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL(_NVML)
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) == 0
            and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        ):
            return int(memory.used)
    return None


class DeviceUsage:
    """Made before the process has a context on its device; others are taken to hold as much when it is settled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Memory = PlainMemory(device)
        self._rest = 0
        self._before = None if device.type == "cpu" else _used_bytes(device)

    def settle(self, memory: Memory) -> None:
        """The engine has been built, its tensors are torch's and `memory`'s."""
        self._memory = memory
        used = None if self._before is None else _used_bytes(self._device)
        if self._before is not None and used is not None:
            self._rest = max(0, used - self._before - self._tensors)

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, now; 0 for a CPU, and without the rest where NVML does not answer."""
        return 0 if self._device.type == "cpu" else self._tensors + self._rest

    @property
    def _tensors(self) -> int:
        return self._memory.num_bytes + torch.cuda.memory_reserved(self._device)
