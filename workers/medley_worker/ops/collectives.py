"""What the ranks of one model say to each other within a forward pass: sums, and what rank 0 knows.

One process a rank, one rank a device. NCCL on CUDA, where all of it can be captured; gloo on CPU. The groups are
torch's own backends without its global state, so a process may have others. Knows no models and no messages.
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

# Ranks meet once their weights are loaded; after that each waits for the others' hosts, never for work to come.
TIMEOUT = timedelta(minutes=10)
LOOPBACK = "127.0.0.1"


class Collectives(Protocol):
    """Every rank calls the same ones in the same order, with tensors of one shape."""

    def add(self, x: Tensor) -> None:
        """Semantics: x = the sum of all ranks' x. Mutated. On the current stream; may be captured."""
        ...

    def spread(self, x: Tensor) -> None:
        """Semantics: x = rank 0's x. Mutated on the other ranks. On the current stream; may be captured."""
        ...


class Alone:
    """Of a model on one device: nothing to say."""

    def add(self, x: Tensor) -> None:
        del x

    def spread(self, x: Tensor) -> None:
        del x


class RankGroup:
    """`Collectives` over the processes that give the same `meeting`, a file that is not there yet in a private folder.

    Building it waits for all of them. A sum's bits depend on its terms alone: of two ranks any order gives the same, of
    more they are added in the order of the ranks, in float32, where NCCL and gloo would take another order at another
    place in the tensor.
    """

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        store: Any = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        self._device, self._size = device, size
        backend: Any
        if device.type == "cuda":
            # All ranks are on this host: nothing listens on an address that others reach.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            options.global_ranks_in_group, options.group_name = list(range(size)), "ranks"
            backend = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = TIMEOUT
            options._devices = [gloo.create_device(hostname=LOOPBACK)]
            backend = gloo(store, rank, size, options)
        self._backend = backend
        # The interpreter never destroys it: NCCL would wait for graphs that hold its kernels. `close` frees its memory.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
        # Not asynchronous: NCCL's kernel runs on the current stream, between its neighbours there.
        self._sum, self._from_first = dist.AllreduceOptions(), dist.BroadcastOptions()
        self._gather = AllgatherOptions()
        self._sum.asyncOp = self._from_first.asyncOp = self._gather.asyncOp = False
        self._from_first.rootRank = 0
        self._connect()

    def add(self, x: Tensor) -> None:
        if self._size > 2:
            self._add_in_order(x)
        else:
            _wait(self._backend.allreduce([x], self._sum))

    def _add_in_order(self, x: Tensor) -> None:
        parts = x.new_empty((self._size * len(x), *x.shape[1:]))
        _wait(self._backend._allgather_base(parts, x, self._gather))
        first, *others = parts.chunk(self._size)
        total = first.to(torch.float32, copy=True)
        for part in others:
            total += part
        x.copy_(total)

    def spread(self, x: Tensor) -> None:
        _wait(self._backend.broadcast([x], self._from_first))

    def abort(self) -> None:
        """Let go of what waits for a rank that has gone: on CUDA its kernels end, with anything in their tensors."""
        if self._device.type == "cuda":
            self._backend.abort()

    def close(self) -> None:
        """Free the connections; graphs with collectives in them are gone."""
        self.abort()

    def _connect(self) -> None:
        """Open all connections now, where a fault is one of the start and no graph is captured."""
        probe = torch.ones(1, dtype=torch.float32, device=self._device)
        self.add(probe)
        self.spread(probe)
        if probe.item() != self._backend.size():
            raise OSError(f"ranks: got a sum of {probe.item():g} over {self._backend.size()} ones")


def _wait(work: Any) -> None:
    """On CUDA the current stream waits, not the host."""
    if work is not None:
        work.wait()
