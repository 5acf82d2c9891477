"""Memory that all ranks of an engine give back and have again: every one of them, or none.

Each rank's own memory is its own matter. Knows no tensors, no adapters and no requests.
"""

from __future__ import annotations

import contextlib

from medley_worker.engine.parallel.followers import Followers, RankDied
from medley_worker.ops.memory import Sleeper


class RanksMemory:
    """`Sleeper` over rank 0's memory and the other ranks'. Any of the three may raise RankDied."""

    def __init__(self, mine: Sleeper, others: Followers) -> None:
        self._mine, self._others = mine, others

    @property
    def can_sleep(self) -> bool:
        return self._mine.can_sleep and self._others.can_sleep

    def sleep(self) -> None:
        """One rank after another: each asks how much the host has left before it takes its part of that."""
        self._mine.sleep()  # where it fails, nobody sleeps yet
        error = self._others.sleep()
        if error is not None:
            self._wake_all()
            raise RuntimeError(error)

    def wake(self) -> None:
        """All at once; returns when all are awake."""
        try:
            self._wake_all()
        except RankDied:
            raise
        except RuntimeError:
            # A part of a model is of no use here, and its memory may be of use to others. All have their copies.
            with contextlib.suppress(RuntimeError):
                self._mine.sleep()
                self._others.sleep()
            raise

    def _wake_all(self) -> None:
        self._others.begin_wake()
        failure: RuntimeError | None = None
        try:
            self._mine.wake()
        except RuntimeError as error:
            failure = error
        reason = self._others.await_woken()
        if failure is not None:
            raise failure
        if reason is not None:
            raise RuntimeError(reason)
