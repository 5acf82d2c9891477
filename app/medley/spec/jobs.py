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


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one job asks for: a prompt as text or as token ids, an adapter (None: the base), sampling, a label."""

    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    adapter: str | None = None
    sampling: SamplingParams = SamplingParams()
    custom_id: str | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a released job keeps: the tokens it has generated and their log-probabilities, in order.

    Noise depends on (seed, position, token id) alone, so tokens and seed are the whole sampling state.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
