"""Copies from host to device memory, and who waits for them: the part of adapter loads that knows torch.cuda.

Knows nothing of adapters: tensors in, fences out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Fence(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Block until what came before it is done. From any thread."""
        ...


class Copier(Protocol):
    """Memory on the host, and the way from there to the device.

    is_async: copies run beside steps, so what a step reads is fenced and host memory is filled ahead of need.
    """

    is_async: bool

    def new_host(self, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        """[count, elements] in host memory from which `copy` is fast."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Fence | None) -> Fence:
        """Copy each (to, from) once `after` is reached. `from` must stay as it is until the fence returned."""
        ...

    def mark(self) -> Fence:
        """The end of all that steps have been given until now."""
        ...

    def join(self, fence: Fence) -> None:
        """What steps are given from now on runs after `fence`."""
        ...


class Reached:
    """The fence of what is done when it is asked for."""

    def wait(self) -> None:
        return


class HostCopier:
    """For a CPU: everything happens at once."""

    is_async = False

    def new_host(self, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        # From calloc, so that what is never used takes no memory.
        memory = np.zeros(count * elements * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(memory).view(dtype).view(count, elements)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Fence | None) -> Fence:
        del after
        for to, source in pairs:
            to.copy_(source)
        return Reached()

    def mark(self) -> Fence:
        return Reached()

    def join(self, fence: Fence) -> None:
        del fence


class CudaFence:
    """An event of one device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # blocking: a thread that waits sleeps, and leaves its core to the one that launches.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaCopier:
    """For a CUDA device: pinned host memory, and copies on a stream of their own. Steps run on the current stream."""

    is_async = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new_host(self, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        with torch.cuda.device(self._device):  # a thread's own current device is the first one
            return torch.empty((count, elements), dtype=dtype, pin_memory=True)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Fence | None) -> Fence:
        if after is not None:
            self._stream.wait_event(_event(after))
        with torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return CudaFence(self._stream)

    def mark(self) -> Fence:
        return CudaFence(torch.cuda.current_stream(self._device))

    def join(self, fence: Fence) -> None:
        torch.cuda.current_stream(self._device).wait_event(_event(fence))


def _event(fence: Fence) -> torch.cuda.Event:
    assert isinstance(fence, CudaFence), "a fence of another copier"
    return fence.event


def new_copier(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else HostCopier()
