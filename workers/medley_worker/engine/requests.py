"""What is asked of an engine and what it answers: requests, outputs, completions.

Plain data; knows nothing of rows, pages or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Checkpoint, Details, FinishReason
from medley.spec.sampling import SamplingParams
from medley.spec.wire import AdapterRef
from medley_worker.engine.sequences import Refused, RequestId

# Alternatives of one answer: as a message some 30 MB, half of what a frame may hold.
MAX_DETAILS = 2_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. adapter: a name given to `Engine.add_adapter`, an AdapterRef, or None for the base.

    num_continuation: the last so many tokens of the prompt are scored given those before, and nothing is generated.
    """

    prompt_token_ids: Seq[int]
    adapter: str | AdapterRef | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_continuation: int = 0

    @property
    def is_drawn(self) -> bool:
        """Whether it asks for new tokens."""
        return self.num_continuation == 0 and self.sampling.max_tokens > 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a step brought for one request.

    new_token_ids, new_logprobs: drawn in this step; empty for a request that is not streamed.
    token_ids, logprobs: all generated tokens, those of a checkpoint included, once it has finished; an end token
    is the last of them. Of a request with a continuation, that, with its log-probabilities. A finished request has a
    `finish_reason` or an `error`. details: what else it asked for, of the new tokens or of all.
    """

    request_id: RequestId
    new_token_ids: tuple[int, ...] = ()
    new_logprobs: tuple[float, ...] = ()
    is_finished: bool = False
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    error: JobError | None = None
    details: Details | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one Request of `Engine.generate`.

    logprobs: of each token under the model's own distribution, before temperature and penalties.
    text: the output before the stop string or end token, for requests with stop strings. error: set where there
    is no result. details: of the same tokens, and of the prompt, for a request that asked for more. Of a request with
    a continuation, token_ids are that and logprobs its own.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    text: str | None = None
    error: JobError | None = None
    details: Details | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is held against."""

    vocab_size: int
    max_model_len: int


def check_request(
    request: Request, checkpoint: Checkpoint | None, limits: Limits, *, is_sampling_checked: bool = False
) -> None:
    """Raise Refused for a request that this model cannot serve; the message never holds the prompt.

    is_sampling_checked: its sampling parameters were held against their limits before, as the service does.
    """
    prompt = request.prompt_token_ids
    if len(prompt) == 0:
        raise Refused(ErrorCode.INVALID_TOKEN, "prompt_token_ids: got no token, wanted 1 or more")
    if not 0 <= request.num_continuation < len(prompt):
        raise Refused(
            ErrorCode.INVALID_TOKEN,
            f"num_continuation: got {request.num_continuation}, wanted less than {len(prompt)}, the tokens there are",
        )
    longest = limits.max_model_len - request.is_drawn
    if len(prompt) > longest:
        raise Refused(
            ErrorCode.PROMPT_TOO_LONG, f"prompt_token_ids: got {len(prompt)} tokens, wanted at most {longest}"
        )
    if (num_details := _num_details(request)) > MAX_DETAILS:
        raise Refused(
            ErrorCode.PROMPT_TOO_LONG,
            f"top_logprobs, prompt_logprobs: got {num_details} alternatives in all, wanted at most {MAX_DETAILS}",
        )
    _check_ids("prompt_token_ids", prompt, limits.vocab_size)
    _check_ids("sampling.logit_bias", tuple(request.sampling.logit_bias), limits.vocab_size)
    if not is_sampling_checked and (faults := request.sampling.faults()):
        raise Refused(ErrorCode.ENGINE, "; ".join(map(str, faults)))
    if checkpoint is not None:
        if len(checkpoint.token_ids) != len(checkpoint.logprobs):
            raise Refused(ErrorCode.ENGINE, "checkpoint: token_ids and logprobs differ in length")
        _check_ids("checkpoint.token_ids", checkpoint.token_ids, limits.vocab_size)


def _num_details(request: Request) -> int:
    """Alternatives that the answer may hold."""
    sampling, num_new = request.sampling, request.num_continuation or request.sampling.max_tokens
    num_prompt = len(request.prompt_token_ids) - request.num_continuation
    return num_prompt * (sampling.prompt_logprobs or 0) + num_new * sampling.top_logprobs


def ended(
    request: Request, checkpoint: Checkpoint, eos_token_ids: tuple[int, ...], max_len: int
) -> FinishReason | None:
    """Why a request that comes with `checkpoint` has nothing left to generate, or None."""
    sampling, num_tokens = request.sampling, len(checkpoint.token_ids)
    stop_ids = (() if sampling.ignore_eos else eos_token_ids) + sampling.stop_token_ids
    if num_tokens > sampling.min_tokens and checkpoint.token_ids[-1] in stop_ids:
        return FinishReason.STOP
    if num_tokens >= sampling.max_tokens or len(request.prompt_token_ids) + num_tokens >= max_len:
        return FinishReason.LENGTH
    return None


def _check_ids(field: str, ids: Seq[int], vocab_size: int) -> None:
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise Refused(ErrorCode.INVALID_TOKEN, f"{field}: got token id {bad}, wanted 0 to {vocab_size - 1}")
