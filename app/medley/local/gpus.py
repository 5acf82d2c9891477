"""Which GPU each worker of a `medley up` has, and which share of its memory: workers take turns over the GPUs.

Each sees its own GPU and no other, so `cuda` is the right device for all of them. It asks `nvidia-smi`, since the
control plane has no torch, and starts nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SHARE = "MEDLEY_GPU_SHARE"
# Of a GPU that workers share: the rest is for what each holds beside what it asks for.
_SHARED_PART = 0.95
_ASK_S = 30.0
_UUID = re.compile(r"UUID: (GPU-[0-9a-fA-F-]+)")


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs over which workers with this environment are spread, as CUDA_VISIBLE_DEVICES names them.

    None where it names another device than "cuda", or no GPU is found.
    """
    if environ.get("MEDLEY_DEVICE") != "cuda":
        return []
    if _VISIBLE in environ:
        return [gpu.strip() for gpu in environ[_VISIBLE].split(",") if gpu.strip()]
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _UUID.findall(asked.stdout)


def gpu_environ(number: int, num_workers: int, gpus: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What worker `number` of `num_workers` gets beside `environ`: its own GPU, or its part of one."""
    if not gpus:
        return {}
    found = {_VISIBLE: gpus[number % len(gpus)]}
    num_sharing = len(range(number % len(gpus), num_workers, len(gpus)))
    if num_sharing > 1 and _SHARE not in environ:
        found[_SHARE] = f"{_SHARED_PART / num_sharing:.3f}"
    return found
