"""One request on its way through the engine: what was asked, and the tokens kept while it holds no row.

Knows nothing of pages, tensors or messages.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import numpy.typing as npt

from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Checkpoint
from medley.spec.sampling import SamplingParams
from medley_worker.engine.findings import Findings

if TYPE_CHECKING:
    from llguidance import LLMatcher

RequestId = Hashable
# (tenant, revision) in the service, ("offline", name) offline; never a path or a name alone.
AdapterKey = tuple[UUID | str, UUID | str]
Tokens = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


class Refused(ValueError):
    """A request that cannot be served; `error` is the job's failure as data."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.error = JobError(code=code, message=message)


class AlreadyInFlight(ValueError):
    """A request's id is that of another one in flight, which stands."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its generated tokens.

    While it holds a row, the row table owns its tokens and `output_ids` is stale; `RowTable.release`
    writes them back. `order` is its place in line, kept over preemption.
    """

    request_id: RequestId
    prompt: Tokens  # [prompt_len]
    sampling: SamplingParams
    seed: int
    adapter: AdapterKey | None
    priority: int
    order: int
    is_streamed: bool  # report new tokens each step, not only at the end
    matcher: LLMatcher | None = None  # of a request whose text must match a grammar: at its kept tokens
    findings: Findings | None = None  # of a request that wants more than its tokens
    output_ids: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    output_logprobs: Logprobs = field(default_factory=lambda: np.empty(0, np.float32))
    row: int | None = None
    num_skips: int = 0  # how often another was admitted past it
    is_announced: bool = False  # it was named as entering a step

    @property
    def num_tokens(self) -> int:
        """Prompt and kept tokens; while it holds a row, ask the row table."""
        return len(self.prompt) + len(self.output_ids)

    @property
    def line_key(self) -> tuple[int, int]:
        """Sorts the waiting line: higher priority first, then who came first."""
        return (-self.priority, self.order)

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are to be generated; else it ends when its prompt is scored."""
        return self.sampling.max_tokens > 0 and (self.findings is None or not self.findings.num_continuation)

    def resume(self, checkpoint: Checkpoint) -> bool:
        """Go on after the tokens of a checkpoint; False where it has none that serve, and all begins anew.

        Tokens without what was asked for beside them would leave a gap; with their seed they are drawn again.
        """
        details = checkpoint.details
        if not checkpoint.token_ids or (self.findings is not None and details is None):
            return False
        if self.findings is not None and details is not None:
            self.findings.restore(details, len(checkpoint.token_ids))
        self.output_ids = np.array(checkpoint.token_ids, np.int32)
        self.output_logprobs = np.array(checkpoint.logprobs, np.float32)
        return True

    def checkpoint(self) -> Checkpoint:
        # Without a generated token there is nothing that computing the prompt again would not bring.
        details = self.findings.details() if self.findings is not None and len(self.output_ids) else None
        return Checkpoint(
            token_ids=tuple(self.output_ids.tolist()), logprobs=tuple(self.output_logprobs.tolist()), details=details
        )
