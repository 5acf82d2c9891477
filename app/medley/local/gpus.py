"""The GPUs of this machine, and which of them each worker of `medley up` has. It knows no torch and starts no worker.

CUDA's driver is asked in a process of its own, as whoever asks it keeps its threads and memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

_COUNT_S = 60.0  # a driver that nobody has used yet takes seconds
_COUNT = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value)
"""
_VISIBLE, _SHARE = "CUDA_VISIBLE_DEVICES", "MEDLEY_GPU_SHARE"


class TooFewGpus(Exception):
    """There are not as many GPUs as the workers want together."""


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that a process with `environ` sees; none without a driver."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _COUNT], env=dict(environ), capture_output=True, text=True, timeout=_COUNT_S
        )
    except subprocess.TimeoutExpired:
        return ()
    count = int(done.stdout) if done.returncode == 0 else 0
    listed = environ.get(_VISIBLE)
    names = map(str, range(count)) if listed is None else (name.strip() for name in listed.split(","))
    return tuple(names)[:count]


def share_gpus(
    gpus: Sequence[str], device: str, num_workers: int, size: int, share: float | None = None
) -> list[dict[str, str]]:
    """What each worker's environment says of devices: `size` GPUs, counted from `device` on.

    device: "cuda" or "cuda:<n>". share: of a GPU's memory that a worker takes; workers then take turns over the GPUs.
    None: each worker has GPUs of its own. Raises TooFewGpus.
    """
    index = device.partition(":")[2]
    first = int(index) if index.isdecimal() else 0
    to_a_gpu = 1 if share is None else max(1, int(1 / share))
    num_places = -(-num_workers // to_a_gpu)
    wanted = first + num_places * size
    if wanted > len(gpus):
        each = "a GPU" if size == 1 else f"{size} GPUs"
        whose = "of its own" if share is None else f"with {to_a_gpu - 1} others at the most"
        raise TooFewGpus(
            f"GPUs: got {len(gpus)}, wanted {wanted}: each of {num_workers} workers has {each} {whose},"
            f" from {device} on; ask for fewer by --workers or --tensor-parallel, let them share by a lower {_SHARE},"
            f" or see what {_VISIBLE} hides"
        )
    num_places = min(num_workers, (len(gpus) - first) // size)
    starts = [first + worker % num_places * size for worker in range(num_workers)]
    # Not by MEDLEY_DEVICE: a process may take memory of each GPU that it sees.
    return [{_VISIBLE: ",".join(gpus[start : start + size]), "MEDLEY_DEVICE": "cuda"} for start in starts]
