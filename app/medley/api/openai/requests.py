"""From a request's body to the fields of its jobs: prompts, seeds, and sampling by `sampling`. The seam on the way in.

A request is `len(prompts) * n` jobs, the samples of a prompt beside each other. What cannot be said of one request
alone (whether its model exists, whether its custom_id is the only one) is for the callers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import structlog

from medley.api.decoding import Data, decode_fields
from medley.api.job_bodies import TOKEN_ID_BYTES, prompt_faults, sampling_json
from medley.api.openai.bodies import MAX_JOBS, ChatBody, CompletionBody, not_served
from medley.api.openai.chat_template import ChatTemplate, TemplateRefuses, UnusableTemplate, template_messages
from medley.api.openai.sampling import sampling_of
from medley.config import Limits, Settings
from medley.db.new_jobs import JobColumns
from medley.spec.base_models import read_base_model
from medley.spec.errors import Fault
from medley.spec.sampling import MAX_TOKENS_LIMIT, sample_seed

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)

log = structlog.get_logger()


@dataclass(frozen=True)
class Prompt:
    """Text or token ids; `is_templated`: the text holds its special tokens already."""

    text: str | None = None
    token_ids: list[int] | None = None
    is_templated: bool = False

    @property
    def num_bytes(self) -> int:
        return TOKEN_ID_BYTES * len(self.token_ids or ()) if self.text is None else len(self.text.encode())


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an answer shows of a result beyond its text."""

    with_logprobs: bool = False
    with_prompt: bool = False

    def to_json(self) -> str | None:
        """As it is stored beside a job; None where nothing is to be said."""
        return None if self == Answer() else msgspec.json.encode(self).decode()

    @classmethod
    def from_stored(cls, stored: dict[str, Any] | None) -> Answer:
        return msgspec.convert(stored or {}, cls)


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

    @property
    def num_bytes(self) -> int:
        """Of the prompts of all its jobs, as quotas count them."""
        return self.num_samples * sum(prompt.num_bytes for prompt in self.prompts)

    def seed_of(self, sample: int) -> int | None:
        """Of a sample of each prompt; None is drawn."""
        return None if self.seed is None else sample_seed(self.seed, sample)


def job_columns(requests: Sequence[tuple[Request, str | None, UUID | None]], base_name: str) -> JobColumns:
    """The jobs of (request, custom_id, revision), in order, as they are written."""
    rows = [
        (request, custom_id, revision, prompt, sample)
        for request, custom_id, revision in requests
        for prompt in request.prompts
        for sample in range(request.num_samples)
    ]
    return JobColumns(
        revisions=[revision for _, _, revision, _, _ in rows],
        adapters=[None if r.model == base_name else r.model for r, _, _, _, _ in rows],
        max_tokens=[r.max_tokens for r, _, _, _, _ in rows],
        seeds=[r.seed_of(sample) for r, _, _, _, sample in rows],
        custom_ids=[custom_id for _, custom_id, _, _, _ in rows],
        prompts=[prompt.text for _, _, _, prompt, _ in rows],
        token_ids=[prompt.token_ids for _, _, _, prompt, _ in rows],
        samplings=[r.sampling for r, _, _, _, _ in rows],
        sample_idx=[sample if r.num_samples > 1 else None for r, _, _, _, sample in rows],
        templated=[prompt.is_templated or None for _, _, _, prompt, _ in rows],
        answers=[r.answer.to_json() for r, _, _, _, _ in rows],
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
        sampling = sampling_of(body, faults, max_chat_tokens=self._max_chat_tokens)
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
            sampling=sampling_json(sampling),
            max_tokens=sampling.max_tokens,
            seed=body.seed,
            answer=_answer_of(body),
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


def _answer_of(body: CompletionBody | ChatBody) -> Answer:
    if isinstance(body, ChatBody):
        return Answer(with_logprobs=bool(body.logprobs))
    return Answer(with_logprobs=body.logprobs is not None, with_prompt=bool(body.echo))
