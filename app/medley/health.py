"""Whether a process without a port is well: its loop touches a file each turn, `medley health` reads its age.

It knows nothing of what the loop does.
"""

from __future__ import annotations

import time
from pathlib import Path

# Turns take about a second; a stall of a few is a slow disk, more is a fault.
MAX_AGE_S = 15.0


def beat(path: Path | None) -> None:
    """Say that this process's loop has just made a turn; None means that nobody asks."""
    if path is not None:
        path.touch()


def is_alive(path: Path, *, max_age_s: float = MAX_AGE_S) -> bool:
    """True where the loop made a turn within `max_age_s` seconds."""
    try:
        return time.time() - path.stat().st_mtime <= max_age_s
    except FileNotFoundError:
        return False
