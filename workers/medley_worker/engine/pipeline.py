"""Steps that are launched and not read yet; reading one writes its tokens to their rows.

Owns the order of tickets and the times of steps. Knows rows; no requests, no messages, no tensors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from medley_worker.engine.forward import Forward, Ticket
from medley_worker.engine.plans import Chunk, Rows, StepPlan
from medley_worker.engine.rows import RowTable
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import Logprobs


@dataclass(frozen=True, slots=True)
class _Launched:
    ticket: Ticket
    rows: Rows  # [R]
    places: npt.NDArray[np.int64]  # [R]: where in its row each token belongs
    tenures: npt.NDArray[np.int64]  # [R]: whose rows they were
    scored: list[Chunk]
    scored_tenures: npt.NDArray[np.int64]  # [scored]
    num_decode_rows: int
    num_prompt_tokens: int
    started_at: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """elapsed_s: from the end of the step before, or from its own start where nothing ran."""

    num_decode_rows: int
    num_prompt_tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step brought for the rows that still hold the sequences it was launched for, in its own order.

    bad_rows: rows whose logits held NaN; they are not in `rows`, and got no token. scored_rows: rows whose prompts are
    scored to their ends, and that draw no token.
    """

    rows: Rows  # [R]
    token_ids: npt.NDArray[np.int64]  # [R]
    logprobs: Logprobs  # [R]
    is_stop: npt.NDArray[np.bool_]  # [R]: ended by an end token
    is_long: npt.NDArray[np.bool_]  # [R]: ended by length
    bad_rows: list[int]
    scored_rows: list[int]
    time: StepTime

    def where(self, is_kept: npt.NDArray[np.bool_]) -> Drawn:
        """Without the rows [R] that are not kept."""
        return replace(
            self,
            rows=self.rows[is_kept],
            token_ids=self.token_ids[is_kept],
            logprobs=self.logprobs[is_kept],
            is_stop=self.is_stop[is_kept],
            is_long=self.is_long[is_kept],
        )


class Pipeline:
    """At most `forward.depth` steps stay unread once `has_excess` is False.

    launch_s, wait_s: seconds spent in launches, and waiting for results.
    """

    def __init__(
        self, forward: Forward, rows: RowTable, scheduler: Scheduler, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._forward = forward
        self._rows = rows
        self._scheduler = scheduler
        self._clock = clock
        self._launched: deque[_Launched] = deque()
        self._ended_at = 0.0  # when the last result came
        self.launch_s = 0.0
        self.wait_s = 0.0

    @property
    def depth(self) -> int:
        return self._forward.depth

    @property
    def num_in_flight(self) -> int:
        return len(self._launched)

    @property
    def has_excess(self) -> bool:
        """Whether `collect` must be called before the next launch."""
        return len(self._launched) > self._forward.depth

    def launch(self, plan: StepPlan, started_at: float) -> None:
        """Start a step and advance the rows as if it had run. started_at: when work on it began, by the clock."""
        sampled = plan.sampled_rows()
        before = self._clock()
        ticket = self._forward.launch(plan, sampled)
        self.launch_s += self._clock() - before
        self._scheduler.advance(plan)
        tenures = self._rows.tenure[sampled]
        places = self._scheduler.expect(sampled)
        scored = plan.scored_chunks
        self._launched.append(
            _Launched(
                ticket,
                sampled,
                places,
                tenures,
                scored,
                self._rows.tenure[[chunk.row for chunk in scored]],
                num_decode_rows=len(plan.decode_rows),
                num_prompt_tokens=sum(chunk.num_tokens for chunk in plan.chunks),
                started_at=started_at,
            )
        )

    def collect(self) -> Drawn:
        """Wait for the oldest step and write its tokens to their rows. Rows that got another owner get nothing."""
        step = self._launched.popleft()
        before = self._clock()
        result = step.ticket.result()
        now = self._clock()
        self.wait_s += now - before
        elapsed_s = now - max(step.started_at, self._ended_at)
        self._ended_at = now
        rows, places = step.rows, step.places
        token_ids, logprobs = result.token_ids, result.logprobs
        is_kept = self._rows.tenure[rows] == step.tenures
        bad_rows: list[int] = []
        scored_rows: list[int] = []
        if step.scored:
            assert result.scores is not None
            bad_rows, scored_rows = self._rows.write_scores(step.scored, step.scored_tenures, result.scores)
            is_kept &= ~np.isin(rows, bad_rows)
        if result.is_bad is not None:
            bad_rows += rows[result.is_bad & is_kept].tolist()
            is_kept &= ~result.is_bad
        if result.tops is not None:
            self._rows.write_tops(rows, is_kept, result.tops)
        if not is_kept.all():
            rows, places, token_ids, logprobs = rows[is_kept], places[is_kept], token_ids[is_kept], logprobs[is_kept]
        is_stop, is_long = self._rows.write(rows, places, token_ids, logprobs)
        times = StepTime(step.num_decode_rows, step.num_prompt_tokens, elapsed_s)
        return Drawn(rows, token_ids, logprobs, is_stop, is_long, bad_rows, scored_rows, times)
