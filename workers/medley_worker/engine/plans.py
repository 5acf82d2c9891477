"""One step as the scheduler has decided it: which rows decode, and which chunks of prompts run beside them.

Plain data; knows nothing of how it was decided or of how it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medley.spec.errors import JobError
from medley_worker.engine.sequences import Sequence

Rows = npt.NDArray[np.int64]  # row indices


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + num_tokens of a row's known tokens, to be computed in this step.

    Of the row's own tokens first_target .. first_target + num_targets the log-probabilities are wanted: each is
    given by the logits of the token before it, which lies in the chunk.
    """

    row: int
    start: int
    num_tokens: int
    is_last: bool  # the next token is drawn after it
    first_target: int = 0
    num_targets: int = 0


@dataclass(slots=True)
class StepPlan:
    """One step. Decode rows and chunks are each sorted by adapter, so that segments are contiguous."""

    decode_rows: Rows
    chunks: list[Chunk] = field(default_factory=list)
    entering: list[Sequence] = field(default_factory=list)  # admitted now and not announced before
    failed: list[tuple[Sequence, JobError]] = field(default_factory=list)  # gone; they hold nothing any more
    num_preempted: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.chunks and len(self.decode_rows) == 0

    @property
    def scored_chunks(self) -> list[Chunk]:
        """Those that hold tokens whose log-probabilities are wanted, in order."""
        return [chunk for chunk in self.chunks if chunk.num_targets]

    def sampled_rows(self) -> Rows:
        """[R]: the rows whose next token is drawn: decode rows, then rows whose last chunk this is."""
        if not self.chunks:
            return self.decode_rows
        last = [chunk.row for chunk in self.chunks if chunk.is_last]
        return np.concatenate([self.decode_rows, np.array(last, np.int64)])

    def scored_places(self) -> npt.NDArray[np.int64]:
        """[S]: the tokens whose logits score the next one, counted over decode rows and chunks without padding."""
        places, start = [np.zeros(0, np.int64)], len(self.decode_rows)
        for chunk in self.chunks:
            if chunk.num_targets:
                first = start + chunk.first_target - 1 - chunk.start
                places.append(np.arange(first, first + chunk.num_targets))
            start += chunk.num_tokens
        return np.concatenate(places)
