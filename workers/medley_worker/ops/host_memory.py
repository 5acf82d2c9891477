"""How much memory this machine, or the container that this process runs in, can still give. Knows no tensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
# What the system can take from files at any time; it counts as used.
_RECLAIMABLE = ("inactive_file", "active_file")


def available_bytes(machine: Path = _MACHINE, container: Path = _CONTAINER) -> int:
    """Bytes that can be taken without swapping or being killed for it, pages of files counted as free."""
    for line in machine.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            break
    else:
        raise OSError(f"{machine} has no MemAvailable")
    with suppress(OSError, ValueError):  # no limit, or one of another kind
        limit, current = (int((container / name).read_text()) for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        files = sum(int(fields.get(name, 0)) for name in _RECLAIMABLE)
        available = min(available, limit - current + files)
    return max(0, available)
