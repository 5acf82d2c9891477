"""What a step asks of a forward pass and what it answers; and the null one, which computes nothing.

No torch here: the real one is runner.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medley.spec.sampling import MAX_LOGPROBS
from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import Scores, StepResult, Tops
from medley_worker.engine.rows import RowTable


class Ticket(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step, even where it drew nothing. Called once, in the order of the launches."""
        ...


class Forward(Protocol):
    """Runs steps.

    depth: how many launched steps may be unread when the next one is launched. 0: each is read at once. 1: a row
    whose newest token is unread (`rows.is_pending`) decodes from the forward pass's own copy of that token.
    """

    depth: int

    def launch(self, plan: StepPlan, sampled: Rows) -> Ticket:
        """Compute the plan's tokens, draw the next one for each row of `sampled`, and score the chunks' targets.

        sampled: [R], the plan's decode rows and then the rows of its last chunks, in the plan's order. Rows and
        plan are read before it returns. No pending row of it has `rows.needs_output`.
        """
        ...


@dataclass(frozen=True, slots=True)
class DoneTicket:
    """Of a step that was computed when it was launched."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class NullForward:
    """Tokens that depend on (seed, position) alone, without a model: for measuring all that is around it."""

    depth = 0

    def __init__(self, rows: RowTable, vocab_size: int) -> None:
        self._rows = rows
        self._vocab_size = vocab_size

    def launch(self, plan: StepPlan, sampled: Rows) -> DoneTicket:
        position = self._rows.num_tokens[sampled]
        # The multipliers of a linear congruential generator (Knuth, MMIX): cheap, and spread enough for a stand-in.
        mixed = (self._rows.seed[sampled] + position) * 6364136223846793005 + 1442695040888963407
        token_ids = (mixed >> 33) % self._vocab_size
        num_topped = int(np.count_nonzero(self._rows.num_top[sampled]))
        num_targets = sum(chunk.num_targets for chunk in plan.chunks)
        return DoneTicket(
            StepResult(
                token_ids,
                np.full(len(sampled), -1.0, np.float32),
                None,
                self._tops(num_topped) if num_topped else None,
                self._scores(num_targets) if num_targets else None,
            )
        )

    def _tops(self, num: int) -> Tops:
        ids = np.tile(np.arange(min(MAX_LOGPROBS, self._vocab_size)), (num, 1))
        return Tops(ids, np.full(ids.shape, -1.0, np.float32))

    def _scores(self, num: int) -> Scores:
        is_bad = np.zeros(num, np.bool_)
        return Scores(np.full(num, -1.0, np.float32), ~is_bad, is_bad, self._tops(num))
