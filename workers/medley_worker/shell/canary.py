"""The canary: one small request on the base model, by which an engine proves that it and its machine can run at all.

Owns what is asked and what was answered. Knows neither processes nor jobs.
"""

from __future__ import annotations

from medley.spec.ids import uuid7
from medley.spec.sampling import SamplingParams
from medley.spec.wire import Finished, JobKey, WorkItem

_PROMPT = (1, 2)  # every vocabulary has them
_SAMPLING = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)  # one token of the prefill, one of a decode step


class Canary:
    """The canary of one engine: to be sent once, then waited for."""

    def __init__(self) -> None:
        # No job has attempt 0, so the answer is nobody's result.
        self.item = WorkItem(JobKey(uuid7(), 0), _PROMPT, None, _SAMPLING)
        self.is_sent = False
        self._answer: Finished | None = None

    def hear(self, message: Finished) -> bool:
        """Whether it was the canary's; keeps it then."""
        if message.key != self.item.key:
            return False
        self._answer = message
        return True

    @property
    def is_answered(self) -> bool:
        return self._answer is not None

    @property
    def fault(self) -> str | None:
        """Why the answer proves nothing; None where it does."""
        assert self._answer is not None
        error = self._answer.error
        return None if error is None else f"{error.code}: {error.message}"
