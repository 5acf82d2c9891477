"""The job: its states, and what a tenant may ask for."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from medley.spec.sampling import SamplingParams


class JobState(StrEnum):
    """`queued -> leased | cancelled | expired | failed`; `leased -> queued` and every terminal state."""

    QUEUED = "queued"
    LEASED = "leased"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.LEASED)


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, a stop string or a stop id
    LENGTH = "length"  # max_tokens, or the model's length
    SCORED = "scored"  # nothing was to be generated: the continuation has its log-probabilities


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one job asks for: a prompt as text or as token ids, an adapter (None: the base), sampling, a label.

    continuation, continuation_token_ids: one of them makes it a scoring job, which generates nothing: the answer is
    the continuation's log-probability given the prompt.
    """

    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    continuation: str | None = None
    continuation_token_ids: tuple[int, ...] | None = None
    adapter: str | None = None
    sampling: SamplingParams = SamplingParams()
    custom_id: str | None = None


class Details(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a job has asked for beyond its tokens; its fields are columns of `job_results` too.

    top_token_ids, top_logprobs: the k likeliest tokens at the place of each generated (or scored) token, best first,
    one place after the other: n x k entries. prompt_token_ids: the prompt as it was tokenised; prompt_logprobs: of
    each of its tokens but the first, given those before it; prompt_top_*: as top_*, at those places. is_greedy:
    whether each token of a scored continuation is the likeliest at its place.
    """

    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_token_ids: tuple[int, ...] = ()
    prompt_top_logprobs: tuple[float, ...] = ()
    is_greedy: bool | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a released job keeps: the tokens it has generated and their log-probabilities, in order.

    Noise depends on (seed, position, token id) alone, so tokens and seed are the whole sampling state. details: what
    else was found of these tokens and of the prompt, for a job that asked for it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    details: Details | None = None
