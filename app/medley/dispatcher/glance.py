"""What the leader saw when it last planned, for those who look from other threads: metrics, and calls about scale.

The loop puts one picture in the place of another and does nothing more; what is asked of it is computed by who asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from medley.db.workers import Stand, WorkerState
from medley.dispatcher.planner import Waits


@dataclass(frozen=True)
class Glance:
    """One plan's view. rows: the living workers'; job_tokens, waited_s: of a lane, as `Sightings` has them."""

    at_s: float  # of the dispatcher's monotonic clock
    pool: str
    term: int
    waiting: Sequence[Waits]
    rows: Sequence[Stand]
    num_wanted: int
    job_tokens: Callable[[UUID], float]
    waited_s: Callable[[UUID, float], float]
    oldest_batch_s: float  # of the open ones that are not paused

    @property
    def num_queued(self) -> int:
        return sum(waits.num_queued for waits in self.waiting)

    @property
    def queued_tokens(self) -> float:
        """As the claims will charge them, prompts and twice the output."""
        return sum(waits.num_queued * self.job_tokens(waits.lane) for waits in self.waiting)

    @property
    def unserved_s(self) -> float:
        """The longest that a lane with waiting jobs has gone without one of them being taken."""
        return max((self.waited_s(waits.lane, self.at_s) for waits in self.waiting), default=0.0)

    @property
    def num_leased(self) -> int:
        return sum(row.num_leased for row in self.rows)

    @property
    def num_registered(self) -> int:
        """Workers that may serve: all that an operator has not put to sleep."""
        return sum(row.held_state != WorkerState.ASLEEP for row in self.rows)

    @property
    def states(self) -> Counter[str]:
        return Counter(str(row.state) for row in self.rows)

    def active(self) -> list[Stand]:
        return [row for row in self.rows if row.state in (WorkerState.ACTIVE, WorkerState.DRAINING)]

    def releasable(self, after_s: float) -> list[Stand]:
        """Workers that have slept for `after_s`, nobody's hand on them."""
        return [
            row
            for row in self.rows
            if row.state == row.desired_state == WorkerState.ASLEEP
            and row.held_state is None
            and row.unchanged_s >= after_s
        ]
