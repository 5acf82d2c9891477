"""A CUDA driver that can count its GPUs and nothing else, for machines without one: built with the C compiler."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# As CUDA's own: names that are no GPU's end the list, and what is asked before cuInit fails.
_SOURCE = """
#include <stdlib.h>
static int num_seen = -1;
int cuInit(unsigned flags) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    num_seen = NUM_GPUS;
    if (!visible) return 0;
    num_seen = 0;
    for (const char *at = visible; *at; ) {
        while (*at == ' ') at++;
        if (*at >= '0' && *at <= '9' && atoi(at) >= NUM_GPUS) break;
        num_seen++;
        while (*at && *at != ',') at++;
        if (*at) at++;
    }
    return 0;
}
int cuDeviceGetCount(int *count) { *count = num_seen; return num_seen < 0 ? 3 : 0; }
"""


def make_driver(folder: Path, num_gpus: int) -> dict[str, str]:
    """The environment of a machine with so many GPUs; the driver lies in `folder`."""
    source = folder / "driver.c"
    source.write_text(_SOURCE)
    argv = ["cc", "-shared", "-fPIC", f"-DNUM_GPUS={num_gpus}", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(argv, check=True)
    environ = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return environ | {"LD_LIBRARY_PATH": str(folder)}
