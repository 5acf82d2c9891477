"""Ranks that share one GPU, for machines with one: NCCL refuses that, so sums go through the host, by gloo.

Weights, caches, adapters, attention, SGMV, messages and sleep are those of ranks on GPUs of their own; of graphs there
are none, as what goes through the host cannot be captured. `python -m one_gpu --fd N` is such a rank's process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medley_worker.engine import assembly
from medley_worker.engine.parallel import follower, followers, process
from medley_worker.ops.collectives import RankGroup

DEVICE = "cuda:0"


class HostGroup:
    """`RankGroup` of tensors on a GPU, by way of the host."""

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        assert device.type == "cuda"
        self._group = RankGroup(meeting, rank, size, torch.device("cpu"))

    def add(self, x: Tensor) -> None:
        host = x.float().cpu()
        self._group.add(host)
        x.copy_(host)  # rounded once, as NCCL's sum of two

    def spread(self, x: Tensor) -> None:
        host = x.float().cpu()
        self._group.spread(host)
        x.copy_(host)

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()


class NoGraphs:
    """`DecodeGraphs` and `TrunkGraphs` that have none."""

    def __init__(self, *_: object) -> None: ...

    def has(self, *_: object) -> bool:
        return False

    def capture(self, *_: object) -> None: ...

    def clear(self) -> None: ...


def share_it(patch: pytest.MonkeyPatch) -> None:
    """Have the engines of this process share its GPU among their ranks."""
    from medley_worker.engine import cuda_passes  # where there is CUDA

    for module in (assembly, follower):
        patch.setattr(module, "rank_device", lambda *_: DEVICE)
        patch.setattr(module, "RankGroup", HostGroup)
    patch.setattr(assembly, "check_devices", lambda _: None)
    patch.setattr(cuda_passes, "DecodeGraphs", NoGraphs)
    patch.setattr(cuda_passes, "TrunkGraphs", NoGraphs)
    patch.setattr(followers, "PROCESS", "one_gpu")
    here = str(Path(__file__).parent)
    patch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))


def main() -> int:
    """A following rank."""
    with pytest.MonkeyPatch.context() as patch:
        share_it(patch)
        return process.main()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
