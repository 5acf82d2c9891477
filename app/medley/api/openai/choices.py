"""From jobs' results to what an answer shows: choices, usage, errors. The seam on the way out.

Knows rows of `results.read_answers` and `tokens`; what was asked stands in each row's `answer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Row

from medley.api.openai.errors import OpenAIError, error_of
from medley.api.openai.logprobs import ChatLogprobs, TextLogprobs, chat_logprobs, text_logprobs
from medley.api.openai.requests import CHAT, Answer
from medley.api.openai.tokens import TokenTexts
from medley.spec.errors import ErrorCode
from medley.spec.jobs import FinishReason


class CompletionUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: TextLogprobs | None = None


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


class TextCompletion(msgspec.Struct):
    """A completion: a choice a prompt and sample."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage
    object: Literal["text_completion"] = "text_completion"


class ChatCompletion(msgspec.Struct):
    """The answer to a chat: a choice a sample."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    object: Literal["chat.completion"] = "chat.completion"


def text_choice(index: int, row: Row[Any], texts: TokenTexts) -> TextChoice:
    """One job's result as one choice of a completion."""
    asked = Answer.from_stored(row.answer)
    prompt = ""
    if asked.with_prompt:
        prompt = texts.joined(row.given_ids) if row.prompt is None else row.prompt
    shown = text_logprobs(row, prompt, texts) if asked.with_logprobs else None
    return TextChoice(index, prompt + (row.text or ""), _finish_reason(row), shown)


def chat_choice(index: int, row: Row[Any], texts: TokenTexts) -> ChatChoice:
    """One job's result as one choice of a chat."""
    shown = chat_logprobs(row, texts) if Answer.from_stored(row.answer).with_logprobs else None
    return ChatChoice(index, ChatMessage(row.text or ""), _finish_reason(row), shown)


def _finish_reason(row: Row[Any]) -> str | None:
    # A prompt that was scored alone has all the tokens that it asked for.
    return "length" if row.finish_reason == FinishReason.SCORED else row.finish_reason


def usage_of(rows: Sequence[Row[Any]]) -> CompletionUsage:
    """The tokens of a request: a prompt counts once, however many samples of it there are."""
    prompt = sum(row.prompt_tokens for row in rows if not row.sample_idx)
    completion = sum(row.completion_tokens for row in rows)
    return CompletionUsage(prompt, completion, prompt + completion)


def usage_before(rows: Sequence[Row[Any]]) -> CompletionUsage:
    """The tokens of what a retry has superseded, counted in the same way."""
    prompt = sum(row.earlier_prompt_tokens for row in rows if not row.sample_idx)
    completion = sum(row.earlier_completion_tokens for row in rows)
    return CompletionUsage(prompt, completion, prompt + completion)


def completion_of(
    endpoint: str, rows: Sequence[Row[Any]], base_name: str, texts: TokenTexts
) -> TextCompletion | ChatCompletion:
    """The answer to a request whose jobs have all succeeded. rows: theirs, in order."""
    first = rows[0]
    created = int(max(row.finished_at for row in rows).timestamp())
    model, usage = first.adapter or base_name, usage_of(rows)
    if endpoint == CHAT:
        chats = [chat_choice(i, row, texts) for i, row in enumerate(rows)]
        return ChatCompletion(f"chatcmpl-{first.id.hex}", created, model, chats, usage)
    choices = [text_choice(i, row, texts) for i, row in enumerate(rows)]
    return TextCompletion(f"cmpl-{first.id.hex}", created, model, choices, usage)


# What of a job that failed lies in its request; the rest is the service's.
_OF_REQUEST: set[str] = {
    ErrorCode.PROMPT_TOO_LONG,
    ErrorCode.INVALID_TOKEN,
    ErrorCode.INVALID_GRAMMAR,
    ErrorCode.ADAPTER_TOO_LARGE,
    ErrorCode.ADAPTER_REVOKED,
    ErrorCode.ADAPTER_QUARANTINED,
    ErrorCode.JOB_QUARANTINED,
}
# OpenAI's own words, where it has one.
_CODES: dict[str, str] = {ErrorCode.PROMPT_TOO_LONG: "context_length_exceeded"}


def failure_of(row: Row[Any]) -> tuple[int, OpenAIError]:
    """(status, error) of a job that failed: what an HTTP service would have said."""
    # As it is stored: a newer worker may have a code that this process does not know.
    code: str = row.error_code or "unknown"
    status = 400 if code in _OF_REQUEST else 503 if code == ErrorCode.ADAPTER_UNAVAILABLE else 500
    return status, error_of(status, _CODES.get(code, code), row.error_message or code)


def group_by_request(rows: Sequence[Row[Any]]) -> Iterator[list[Row[Any]]]:
    """Rows that stand together and share their custom_id: the jobs of a request."""
    group: list[Row[Any]] = []
    for row in rows:
        if group and row.custom_id != group[0].custom_id:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
