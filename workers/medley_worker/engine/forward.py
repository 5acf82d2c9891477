"""What a step asks of a forward pass and what it answers; and the null one, which computes nothing.

No torch here: the real one is runner.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medley_worker.engine.rows import Rows, RowTable
from medley_worker.engine.scheduler import StepPlan
from medley_worker.engine.sequences import Logprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens drawn for `sampled`, in its order.

    is_bad: rows whose logits held NaN, None where there were none; their tokens mean nothing.
    """

    token_ids: npt.NDArray[np.int64]  # [R]
    logprobs: Logprobs  # [R], of the model's own distribution, before any sampling parameter
    is_bad: npt.NDArray[np.bool_] | None


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
        """Compute the plan's tokens and draw the next one for each row of `sampled`.

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
        del plan
        position = self._rows.num_tokens[sampled]
        # The multipliers of a linear congruential generator (Knuth, MMIX): cheap, and spread enough for a stand-in.
        mixed = (self._rows.seed[sampled] + position) * 6364136223846793005 + 1442695040888963407
        token_ids = (mixed >> 33) % self._vocab_size
        return DoneTicket(StepResult(token_ids, np.full(len(sampled), -1.0, np.float32), None))
