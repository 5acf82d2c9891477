"""Which jobs may share the engine after it has died: pure policy, without I/O or state of its own.

The jobs that were in the step when an engine died are suspects: one of them may have killed it. They rerun with
nothing else in the engine, in rounds of at most half as many, so the culprit is alone after log2(n) further deaths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from medley.spec.wire import JobKey

# An engine that dies this often in a row with nothing in its step cannot be helped by leaving jobs out.
MAX_IDLE_DEATHS = 3


@dataclass(frozen=True, slots=True)
class Suspect:
    """A job that may only run with suspects, `step_limit` of them at the most."""

    key: JobKey
    revision: UUID | None  # its adapter; None: the base
    step_limit: int


def limit_after_death(num_suspects: int) -> int:
    """How many of `num_suspects` may share the next step; what `medley.db.crashes` writes to their rows."""
    return max(1, (num_suspects + 1) // 2)


def next_round(suspects: Iterable[Suspect]) -> list[JobKey]:
    """The suspects that run next, alone in the engine; [] where there are none.

    The tightest limit goes first, so the search goes down to the culprit before it looks elsewhere, and the round's
    size is the least limit in it. Within a limit jobs of one adapter stay together, which finds a bad adapter.
    Every round ends its jobs or halves their limit, so rounds end.
    """
    order = sorted(suspects, key=lambda s: (s.step_limit, s.revision.bytes if s.revision else b"", s.key.job.bytes))
    return [s.key for s in order[: order[0].step_limit]] if order else []


class Deaths:
    """Counts deaths in a row of engines that had no job in their step, and paces restarts."""

    def __init__(self) -> None:
        self._num_idle = 0

    def worked(self) -> None:
        """An engine has run jobs: it can."""
        self._num_idle = 0

    def died(self, num_suspects: int) -> float | None:
        """Seconds to wait before the next engine, or None where another one makes no sense."""
        if num_suspects:
            self._num_idle = 0
            return 0.0  # the next rounds are smaller, so this cannot go on for ever
        self._num_idle += 1
        if self._num_idle >= MAX_IDLE_DEATHS:
            return None
        return 0.5 * 2.0 ** (self._num_idle - 1)
