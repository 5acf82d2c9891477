"""What is found for one request beyond its tokens: log-probabilities of its prompt, and the likeliest tokens.

Kept with the request, over preemption too, so that nothing is scored twice. Plain arrays; knows no rows or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medley.spec.jobs import Details
from medley.spec.sampling import SamplingParams

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Findings:
    """Of a prompt [P] of which the last `num_continuation` tokens are to be scored.

    Targets are places of prompt tokens that get a log-probability: num_scored .. P, in order as chunks run.
    """

    def __init__(self, prompt: Ints, num_continuation: int, sampling: SamplingParams) -> None:
        self._prompt = prompt
        self._end = len(prompt)
        self.num_continuation = num_continuation
        self.wants_prompt = sampling.prompt_logprobs is not None
        self.num_top = sampling.top_logprobs  # of generated or scored tokens
        self._num_prompt_top = sampling.prompt_logprobs or 0
        self._first = 1 if self.wants_prompt else self._end - num_continuation
        self.num_scored = self._first
        num_targets = self._end - self._first
        self._logprobs = np.empty(num_targets, np.float32)
        self._is_best = np.empty(num_targets, np.bool_)
        self._top_ids = np.empty((num_targets, self.num_scored_top), np.int32)
        self._top_logprobs = np.empty((num_targets, self.num_scored_top), np.float32)
        self._new_ids: list[Ints] = []  # [num_top] each, of a generated token
        self._new_logprobs: list[Floats] = []

    @property
    def num_scored_top(self) -> int:
        """Alternatives wanted at a target; the least k that serves prompt and continuation."""
        return max(self._num_prompt_top, self.num_top if self.num_continuation else 0)

    def put_scores(self, first: int, logprobs: Floats, is_best: npt.NDArray[np.bool_]) -> None:
        """Targets first .. first + n have these. Both [n]."""
        at = slice(first - self._first, first - self._first + len(logprobs))
        self._logprobs[at], self._is_best[at] = logprobs, is_best
        self.num_scored = first + len(logprobs)

    def put_tops(self, first: int, token_ids: npt.NDArray[np.int64], logprobs: Floats) -> None:
        """The likeliest tokens at targets first .. first + n. Both [n, num_scored_top or more]."""
        k = min(self.num_scored_top, token_ids.shape[1])  # fewer where the vocabulary is smaller
        at = slice(first - self._first, first - self._first + len(token_ids))
        if k < self._top_ids.shape[1]:
            self._top_ids, self._top_logprobs = self._top_ids[:, :k], self._top_logprobs[:, :k]
        self._top_ids[at], self._top_logprobs[at] = token_ids[:, :k], logprobs[:, :k]

    def put_new(self, token_ids: npt.NDArray[np.int64], logprobs: Floats) -> None:
        """The likeliest tokens at the place of the next generated one. Both [num_top or more]."""
        self._new_ids.append(token_ids[: self.num_top].astype(np.int32))
        self._new_logprobs.append(logprobs[: self.num_top].copy())

    def restore(self, details: Details, num_generated: int) -> None:
        """Take over what a checkpoint with so many generated tokens has kept."""
        if details.prompt_logprobs is not None and len(details.prompt_logprobs) == len(self._logprobs):
            self._logprobs[:] = details.prompt_logprobs
            if len(self._logprobs):
                self._top_ids = np.array(details.prompt_top_token_ids, np.int32).reshape(len(self._logprobs), -1)
                self._top_logprobs = np.array(details.prompt_top_logprobs, np.float32).reshape(self._top_ids.shape)
            self.num_scored = self._end
        self._new_ids = list(np.array(details.top_token_ids, np.int32).reshape(num_generated, -1))
        self._new_logprobs = list(np.array(details.top_logprobs, np.float32).reshape(num_generated, -1))

    @property
    def scores(self) -> tuple[Ints, Floats]:
        """The continuation's tokens and their log-probabilities."""
        start = self._end - self.num_continuation
        return self._prompt[start:], self._logprobs[start - self._first :]

    def new_details(self, num_new: int, num_generated: int) -> Details | None:
        """Of the newest tokens of so many generated; the prompt's with the first of them."""
        is_first = num_new == num_generated
        return self._details(num_new, is_first) if self.num_top or is_first else None

    def details(self) -> Details:
        """All that was found, once every target is scored."""
        return self._details(len(self._new_ids), True)

    def _details(self, num_new: int, has_prompt: bool) -> Details:
        start = self._end - self.num_continuation - self._first
        ids, logprobs = self._new_ids[-num_new:] if num_new else [], self._new_logprobs[-num_new:] if num_new else []
        if self.num_continuation:
            ids = list(self._top_ids[start:, : self.num_top])
            logprobs = list(self._top_logprobs[start:, : self.num_top])
        has_prompt = has_prompt and self.wants_prompt
        k = self._num_prompt_top
        return Details(
            top_token_ids=_flat(ids) if self.num_top else (),
            top_logprobs=_flat(logprobs) if self.num_top else (),
            prompt_token_ids=tuple(self._prompt[: self._end - self.num_continuation].tolist()) if has_prompt else None,
            prompt_logprobs=tuple(self._logprobs[:start].tolist()) if has_prompt else None,
            prompt_top_token_ids=tuple(self._top_ids[:start, :k].ravel().tolist()) if has_prompt else (),
            prompt_top_logprobs=tuple(self._top_logprobs[:start, :k].ravel().tolist()) if has_prompt else (),
            is_greedy=bool(self._is_best[start:].all()) if self.num_continuation else None,
        )


def findings_for(prompt: Ints, num_continuation: int, sampling: SamplingParams) -> Findings | None:
    """None for a request that wants its tokens alone."""
    if num_continuation or sampling.top_logprobs or sampling.prompt_logprobs is not None:
        return Findings(prompt, num_continuation, sampling)
    return None


def _flat(parts: Sequence[npt.NDArray[Any]]) -> tuple[Any, ...]:
    return tuple(np.concatenate(parts).tolist()) if parts else ()
