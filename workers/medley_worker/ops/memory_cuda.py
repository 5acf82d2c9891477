"""`memory.Memory` on CUDA: virtual addresses for a tensor's life, physical memory under them while awake.

Captured graphs hold addresses, so they outlive a sleep. What is kept is copied to pinned host memory before the first
sleep and stays there: it never changes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medley_worker.ops.host_memory import available_bytes
from medley_worker.ops.kernels import Kernels, kernels

# What is mapped, and copied, at once: a copy starts while the next piece is mapped.
PIECE_BYTES = 1 << 30
HOST_SHARE = 0.9  # of the host's available memory that a copy may take; pinned, it is out of everybody's reach
ALIGNMENT = 512  # of a tensor among others; torch's own


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def has_virtual_memory(device: torch.device) -> bool:
    """Whether the device and its driver map memory. Builds the library where it is not there. Raises KernelError."""
    return kernels(_index(device)).granularity(_index(device)) > 0


class Range:
    """Addresses, with memory under a part of them that grows from the start. Raises KernelError."""

    def __init__(self, library: Kernels, device_index: int, num_bytes: int) -> None:
        unit = library.granularity(device_index)
        self._library, self._device = library, device_index
        self.num_bytes = -(-max(num_bytes, 1) // unit) * unit
        self._piece = max(unit, PIECE_BYTES // unit * unit)
        self.address = library.reserve(self.num_bytes)
        self._handles: list[tuple[int, int, int]] = []  # (address, bytes, handle)

    @property
    def num_mapped(self) -> int:
        """Bytes of memory under it."""
        return sum(size for _, size, _ in self._handles)

    def map(self) -> Iterator[slice]:
        """Map what is not mapped, piece by piece: which bytes there are now."""
        while (start := self.num_mapped) < self.num_bytes:
            size = min(self._piece, self.num_bytes - start)
            handle = self._library.map(self._device, self.address + start, size)
            self._handles.append((self.address + start, size, handle))
            yield slice(start, start + size)

    def unmap(self) -> None:
        """Nothing that runs uses it any more."""
        while self._handles:
            self._library.unmap(*self._handles[-1])
            self._handles.pop()

    def free(self) -> None:
        """Give memory and addresses back."""
        with torch.cuda.device(self._device), contextlib.suppress(RuntimeError):  # after a fault all of them fail
            torch.cuda.synchronize()
            self.unmap()
            self._library.release(self.address, self.num_bytes)


class _Bytes:
    """How torch takes bytes at an address for a tensor, which holds on to this."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, without a hold on its memory: for what a graph's pool owns and its replays write."""
    place = _Bytes(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
    return torch.as_tensor(place, device=tensor.device).view(tensor.dtype).view(tensor.shape)


class PinnedCopy:
    """Host memory that copies to and from a device use as it is. Raises OSError, RuntimeError."""

    def __init__(self, num_bytes: int) -> None:
        available = available_bytes()
        if num_bytes > HOST_SHARE * available:
            raise RuntimeError(
                f"host memory: {num_bytes} bytes are wanted for what the device gives back, {available} are available"
            )
        # Pages of 2 MiB, touched by all threads: pinning takes 0.3 s a GiB where it has to find pages of 4 KiB.
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(pages, dtype=torch.uint8)  # [num_bytes]; holds on to the pages
        self.memory.zero_()
        code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), len(self.memory), 0))  # type: ignore[no-untyped-call]
        if code:
            raise RuntimeError(f"{num_bytes} bytes of host memory could not be pinned: CUDA error {code}")
        weakref.finalize(self, _unpin, self.memory).atexit = False


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


class _Block:
    """A range and all its bytes as one tensor."""

    def __init__(self, library: Kernels, device: torch.device, num_bytes: int) -> None:
        self.range = Range(library, _index(device), num_bytes)
        holder = _Bytes(self.range.address, self.range.num_bytes)
        weakref.finalize(holder, self.range.free).atexit = False  # the range ends with its tensor
        for _ in self.range.map():
            pass
        self.memory = torch.as_tensor(holder, device=torch.device("cuda", _index(device)))  # [bytes] uint8


class VirtualMemory:
    """Memory of one CUDA device by its driver's virtual memory management."""

    can_sleep = True

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", _index(device))
        self._library = kernels(_index(device))
        self._kept: list[_Block] = []
        self._cleared: list[_Block] = []
        self._copies: list[PinnedCopy] = []
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        return sum(block.range.num_mapped for block in (*self._kept, *self._cleared))

    def kept(self, sizes: Sequence[int]) -> list[Tensor]:
        assert not self._copies, "what is kept was copied already"
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        block = self._new_block(end)
        self._kept.append(block)
        return [block.memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def cleared(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        block = self._new_block(num_bytes)
        block.memory.zero_()
        self._cleared.append(block)
        return block.memory[:num_bytes].view(dtype).view(tuple(shape))

    def sleep(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            if not self._copies:
                self._copies = [self._copy(block) for block in self._kept]
            self._unmap()
            torch.cuda.empty_cache()

    def wake(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # and this thread has the device's context
            try:
                self._fill()
            except BaseException:
                self._unmap()  # a part is of no use here, and may be of use to others
                raise

    def _fill(self) -> None:
        for block, copy in zip(self._kept, self._copies, strict=True):
            for piece in block.range.map():
                with torch.cuda.stream(self._stream):
                    block.memory[piece].copy_(copy.memory[piece], non_blocking=True)
        for block in self._cleared:
            for piece in block.range.map():
                block.memory[piece].zero_()
        torch.cuda.synchronize()

    def _unmap(self) -> None:
        torch.cuda.synchronize()
        for block in (*self._kept, *self._cleared):
            block.range.unmap()

    def _new_block(self, num_bytes: int) -> _Block:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # this thread has the device's context
            return _Block(self._library, self._device, num_bytes)

    def _copy(self, block: _Block) -> PinnedCopy:
        copy = PinnedCopy(block.range.num_bytes)
        copy.memory.copy_(block.memory, non_blocking=True)
        torch.cuda.synchronize()
        return copy
