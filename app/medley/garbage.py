"""How often Python looks for cycles of garbage, for processes that hold much and make next to no cycles.

By default it looks again after 700 new objects: with thousands of jobs held that was a third of its work
(`python -m benchmarks.service`: 5,963 and 9,098 jobs/s).
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 100_000  # new objects that outlive their making, between two looks at those alone
YOUNG_LOOKS = 20  # between two looks at those of middle age
MIDDLE_LOOKS = 50  # between two looks at everything


def collect_rarely() -> None:
    """Set this process so, and leave what it holds now out of every look. Call once, when it is set up."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_LOOKS, MIDDLE_LOOKS)
