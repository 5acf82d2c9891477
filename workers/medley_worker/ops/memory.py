"""Where an engine's large tensors lie: addresses that stay, under which memory is given back and had again.

Knows sizes; no weights, caches or adapters.

| memory | while awake | asleep | awake again |
| `kept` | written once, before the first sleep | its content is on the host | as it was |
| `cleared` | anybody's | nowhere | zeros |
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Sleeper(Protocol):
    """Gives memory back. Whoever calls `sleep` sees to it that nobody reads or writes it until `wake` is over."""

    @property
    def can_sleep(self) -> bool:
        """Whether `sleep` gives memory back here."""
        ...

    def sleep(self) -> None:
        """Give the memory back. Raises RuntimeError or OSError where the host has no room for what is kept; all of it
        is where it was then.
        """
        ...

    def wake(self) -> None:
        """Have memory at the same addresses again, filled. Returns when it is.

        Raises RuntimeError where the device has not that much any more; none is taken then, and it may be tried again.
        """
        ...


class Memory(Sleeper, Protocol):
    """Tensors of one device."""

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, taken by tensors from here beyond what torch's own allocator knows."""
        ...

    def kept(self, sizes: Sequence[int]) -> list[Tensor]:
        """A tensor [size] uint8 for each size, with anything in it, fit for any dtype."""
        ...

    def cleared(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros, now and after each sleep."""
        ...


class PlainMemory:
    """Torch's own memory, which stays where it is."""

    can_sleep = False
    num_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def kept(self, sizes: Sequence[int]) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]

    def cleared(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            return torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        # From calloc, so that what is never used takes no memory.
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = torch.from_numpy(np.zeros(max(num_bytes, 1), dtype=np.uint8))
        return memory[:num_bytes].view(dtype).view(tuple(shape))

    def sleep(self) -> None:
        raise RuntimeError("this engine's memory cannot be given back: it was built without `sleeps`")

    def wake(self) -> None:
        raise RuntimeError("this engine's memory was never given back")


class HostMemory:
    """For a CPU: what is kept lies on the host as it is; pages of the rest go back to the system and come as zeros."""

    can_sleep = True
    num_bytes = 0

    def __init__(self) -> None:
        self._pages: list[mmap.mmap] = []

    def kept(self, sizes: Sequence[int]) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def cleared(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        # Private: pages that others might share are not given back at a word.
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.append(pages)
        return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes].view(dtype).view(tuple(shape))

    def sleep(self) -> None:
        for pages in self._pages:
            pages.madvise(mmap.MADV_DONTNEED)

    def wake(self) -> None:
        """Pages come back as they are touched."""


def new_memory(device: torch.device, *, sleeps: bool) -> Memory:
    """Memory of `device`. sleeps: it may be given back, where the device has a way."""
    if not sleeps:
        return PlainMemory(device)
    if device.type == "cpu":
        return HostMemory()
    # Its library is built where there is CUDA.
    from medley_worker.ops.memory_cuda import VirtualMemory, has_virtual_memory

    return VirtualMemory(device) if has_virtual_memory(device) else PlainMemory(device)
