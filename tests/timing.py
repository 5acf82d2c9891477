"""Upper bounds on time, on machines that may hold any process up for seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUM_TRIES = 5


class Timed:
    """seconds: what the block took, once it has ended."""

    seconds = float("inf")


@contextmanager
def timed() -> Iterator[Timed]:
    took, started = Timed(), time.monotonic()
    yield took
    took.seconds = time.monotonic() - started


def keeps_to(limit_s: float, attempt: Callable[[], float], what: str = "") -> None:
    """`attempt` says what it took, in seconds; one of `NUM_TRIES` must take less than `limit_s`.

    A pause of the machine spoils a try. What is slow by itself is slow in all of them.
    """
    took_s = [attempt()]
    while took_s[-1] >= limit_s:
        assert len(took_s) < NUM_TRIES, f"{what}: took {took_s}, each above {limit_s} s"
        took_s.append(attempt())
