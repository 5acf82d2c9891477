"""From a request's body to the fields of its jobs: prompts, sampling, seeds. The seam on the way in.

A request is `len(prompts) * n` jobs, the samples of a prompt beside each other. What cannot be said of one request
alone (whether its model exists, whether its custom_id is the only one) is for the callers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import structlog

from medley.api.decoding import MAX_SHOWN, Data, decode_fields
from medley.api.job_bodies import judge_sampling, prompt_faults, sampling_json
from medley.api.openai.bodies import (
    MAX_JOBS,
    ChatBody,
    CompletionBody,
    not_served,
)
from medley.api.openai.chat_template import ChatTemplate, TemplateRefuses, UnusableTemplate, template_messages
from medley.config import Limits, Settings
from medley.db.batches import JobColumns
from medley.spec.base_models import read_base_model
from medley.spec.errors import Fault
from medley.spec.sampling import MAX_TOKENS_LIMIT, SEED_LIMIT

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)

# What OpenAI documents where a field is left out. A chat's answer may be as long as the model allows.
DEFAULT_TEMPERATURE = 1.0
DEFAULT_MAX_TOKENS = 16

log = structlog.get_logger()


@dataclass(frozen=True)
class Prompt:
    """Text or token ids; `is_templated`: the text holds its special tokens already."""

    text: str | None = None
    token_ids: list[int] | None = None
    is_templated: bool = False


@dataclass(frozen=True)
class Answer:
    """What an answer shows of a result beyond its text."""

    with_logprobs: bool = False

    def to_json(self) -> str | None:
        """As it is stored beside a job; None where nothing is to be said."""
        return '{"with_logprobs": true}' if self.with_logprobs else None

    @classmethod
    def from_stored(cls, stored: dict[str, Any] | None) -> Answer:
        return cls(**(stored or {}))


@dataclass(frozen=True)
class Request:
    """One request, judged. `sampling` is JSON without the seed. `num_samples` is OpenAI's n."""

    model: str
    prompts: list[Prompt]
    num_samples: int
    sampling: str
    max_tokens: int
    seed: int | None
    answer: Answer
    is_stream: bool
    with_stream_usage: bool

    @property
    def num_jobs(self) -> int:
        return len(self.prompts) * self.num_samples

    def seeds(self) -> list[int | None]:
        """Of each sample of a prompt: the request's own, then others that follow from it; None are drawn."""
        if self.seed is None:
            return [None] * self.num_samples
        return [self.seed, *(_derived_seed(self.seed, k) for k in range(1, self.num_samples))]


def _derived_seed(seed: int, sample: int) -> int:
    # Not seed + sample: a tenant who counts seeds up himself would get equal samples.
    digest = hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % SEED_LIMIT


def job_columns(requests: Sequence[tuple[Request, str | None, UUID | None]], base_name: str) -> JobColumns:
    """The jobs of (request, custom_id, revision), in order, as they are written."""
    rows = [
        (request, custom_id, revision, prompt, sample, seed)
        for request, custom_id, revision in requests
        for prompt in request.prompts
        for sample, seed in enumerate(request.seeds())
    ]
    return JobColumns(
        revisions=[revision for _, _, revision, _, _, _ in rows],
        adapters=[None if r.model == base_name else r.model for r, _, _, _, _, _ in rows],
        max_tokens=[r.max_tokens for r, _, _, _, _, _ in rows],
        seeds=[seed for _, _, _, _, _, seed in rows],
        custom_ids=[custom_id for _, custom_id, _, _, _, _ in rows],
        prompts=[prompt.text for _, _, _, prompt, _, _ in rows],
        token_ids=[prompt.token_ids for _, _, _, prompt, _, _ in rows],
        samplings=[r.sampling for r, _, _, _, _, _ in rows],
        # The sample of its prompt: the first counts the prompt's tokens.
        column_idx=[sample for _, _, _, _, sample, _ in rows],
        templated=[prompt.is_templated or None for _, _, _, prompt, _, _ in rows],
        answers=[r.answer.to_json() for r, _, _, _, _, _ in rows],
    )


class RequestReader:
    """Reads bodies for one base model. template: None where it cannot chat, for the reason `no_chat`."""

    def __init__(
        self,
        limits: Limits,
        template: ChatTemplate | None,
        max_model_len: int | None,
        *,
        no_chat: str = "it has no chat template",
    ) -> None:
        self._limits = limits
        self._template = template
        self._no_chat = no_chat
        self._max_chat_tokens = min(max_model_len or MAX_TOKENS_LIMIT, MAX_TOKENS_LIMIT)

    @classmethod
    def open(cls, settings: Settings) -> RequestReader:
        """For the model that a process is configured with. Raises UnsupportedModel.

        A chat template that cannot be read stops chats alone: completions need none.
        """
        if settings.model is None:
            return cls(settings.limits, None, None, no_chat="this service was started without one")
        folder = Path(settings.model)
        max_model_len = read_base_model(folder, need_weights=False).max_model_len
        try:
            return cls(settings.limits, ChatTemplate.load(folder), max_model_len)
        except UnusableTemplate as error:
            log.warning("chat.unavailable", reason=str(error))
            return cls(settings.limits, None, max_model_len, no_chat=str(error))

    def read(self, endpoint: str, data: Data, *, may_stream: bool) -> tuple[Request | None, list[Fault]]:
        """(the request, []) or (None, every fault of it), the body's of `endpoint`."""
        kind: type[CompletionBody] | type[ChatBody] = CompletionBody if endpoint == COMPLETIONS else ChatBody
        found = decode_fields(data, kind)
        body, faults = found.value, list(found.faults)
        if body is None:
            return None, faults
        faults += not_served(body)
        prompts = self._prompts(body, faults, found.bad)
        sampling, max_tokens = self._sampling(body, faults)
        answer = _answer_of(body, faults)
        num_samples = body.n or 1
        if len(prompts) * num_samples > MAX_JOBS:
            got = f"{len(prompts)} prompts, {num_samples} samples of each"
            faults.append(Fault(field="prompt", got=got, wanted=f"at most {MAX_JOBS} samples in all"))
        if body.stream and not may_stream:
            faults.append(Fault(field="stream", got="true", wanted="false: a line of a batch is answered whole"))
        if faults:
            return None, faults
        options = body.stream_options
        return Request(
            model=body.model,
            prompts=prompts,
            num_samples=num_samples,
            sampling=sampling,
            max_tokens=max_tokens,
            seed=body.seed,
            answer=answer,
            is_stream=bool(body.stream),
            with_stream_usage=bool(options and options.include_usage),
        ), []

    def _prompts(self, body: CompletionBody | ChatBody, faults: list[Fault], bad: frozenset[str]) -> list[Prompt]:
        if isinstance(body, ChatBody):
            return self._chat_prompt(body, faults) if not bad & {"messages", "tools"} else []
        is_templated = body.add_special_tokens is False
        values = _prompt_values(body.prompt, faults)
        for i, value in enumerate(values):
            text, ids = (value, None) if isinstance(value, str) else (None, value)
            for fault in prompt_faults(text, ids, self._limits):
                field = "prompt" if len(values) == 1 else f"prompt[{i}]"
                faults.append(msgspec.structs.replace(fault, field=field))
        return [
            Prompt(text=value, is_templated=is_templated) if isinstance(value, str) else Prompt(token_ids=value)
            for value in values
        ]

    def _chat_prompt(self, body: ChatBody, faults: list[Fault]) -> list[Prompt]:
        template = self._template
        if template is None:
            wanted = f"a model that can chat: {self._no_chat}; use {COMPLETIONS}"
            faults.append(Fault(field="messages", got="a chat", wanted=wanted))
            return []
        messages = template_messages(body.messages, faults)
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not template.takes_tools:
            wanted = "null: the model's chat template does not take tools"
            faults.append(Fault(field="tools", got=f"{len(tools)} tools", wanted=wanted))
        if faults:
            return []
        try:
            text = template.render(
                messages,
                tools=tools or None,
                add_generation_prompt=body.add_generation_prompt is not False,
                options=body.chat_template_kwargs or {},
                max_bytes=self._limits.max_prompt_bytes,
            )
        except TemplateRefuses as error:
            faults.append(Fault(field=error.field, got="what the template refuses", wanted=str(error)))
            return []
        faults += (msgspec.structs.replace(f, field="messages") for f in prompt_faults(text, None, self._limits))
        return [Prompt(text=text, is_templated=body.add_special_tokens is not True)]

    def _sampling(self, body: CompletionBody | ChatBody, faults: list[Fault]) -> tuple[str, int]:
        """(JSON, max_tokens)."""
        max_tokens, default = body.max_tokens, DEFAULT_MAX_TOKENS
        if isinstance(body, ChatBody):
            default = self._max_chat_tokens
            if body.max_completion_tokens is not None:
                if max_tokens not in (None, body.max_completion_tokens):
                    wanted = "one of max_tokens and max_completion_tokens"
                    faults.append(Fault(field="max_tokens", got="both", wanted=wanted))
                max_tokens = body.max_completion_tokens
        values: dict[str, Any] = {
            "max_tokens": default if max_tokens is None else max_tokens,
            "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            # vLLM's clients say 0 or -1 for all.
            "top_k": None if body.top_k in (0, -1) else body.top_k,
            "stop_token_ids": tuple(body.stop_token_ids or ()),
        }
        for name in _AS_THEY_ARE:
            if (value := getattr(body, name)) is not None:
                values[name] = value
        params, found = judge_sampling(values)
        faults += found
        if body.seed is not None and not 0 <= body.seed < SEED_LIMIT:
            faults.append(Fault(field="seed", got=str(body.seed)[:MAX_SHOWN], wanted="0 to 2**63 - 1"))
        return sampling_json(params), params.max_tokens


_AS_THEY_ARE = (
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
)


def _prompt_values(value: Any, faults: list[Fault]) -> Sequence[str | list[int]]:
    """The prompts: one text, texts, one list of ids, or lists of ids."""
    if isinstance(value, str):
        return [value]
    kinds = {type(item) for item in value}
    if kinds == {int}:
        if min(value) < 0 or max(value) >= 2**31:
            faults.append(Fault(field="prompt", got="a negative or huge id", wanted="token ids from 0 to 2**31 - 1"))
        return [value]
    if len(kinds) != 1:
        wanted = "a text, or a list of texts, of token ids, or of lists of token ids"
        faults.append(Fault(field="prompt", got="a list of several kinds", wanted=wanted))
        return []
    values: Sequence[str | list[int]] = value
    return values


def _answer_of(body: CompletionBody | ChatBody, faults: list[Fault]) -> Answer:
    if isinstance(body, CompletionBody):
        if body.logprobs not in (None, 0):
            wanted = "null, or 0 for each token's own; alternatives are not served"
            faults.append(Fault(field="logprobs", got=str(body.logprobs)[:MAX_SHOWN], wanted=wanted))
        return Answer(with_logprobs=body.logprobs is not None)
    if body.top_logprobs not in (None, 0):
        wanted = "null or 0; alternatives are not served"
        faults.append(Fault(field="top_logprobs", got=str(body.top_logprobs)[:MAX_SHOWN], wanted=wanted))
    elif body.top_logprobs is not None and not body.logprobs:
        faults.append(Fault(field="top_logprobs", got="0", wanted="null, or logprobs: true beside it"))
    return Answer(with_logprobs=bool(body.logprobs))
