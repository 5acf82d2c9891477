"""From jobs' results to what an answer shows: choices, usage, errors. The seam on the way out.

Knows rows of `batches.read_answers` and `tokens`; what was asked stands in each row's `answer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import Row

from medley.api.openai.errors import OpenAIError, error_of
from medley.api.openai.requests import CHAT, Answer
from medley.api.openai.tokens import TokenTexts
from medley.spec.errors import RETRYABLE, ErrorCode


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(msgspec.Struct):
    """Of completions: a list an aspect. `top_logprobs` is null where no alternatives were asked for."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: TextLogprobs | None = None


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


class Completion(msgspec.Struct):
    """The answer to a request; of both kinds."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice] | list[ChatChoice]
    usage: Usage


def choice_of(endpoint: str, index: int, row: Row[Any], texts: TokenTexts) -> TextChoice | ChatChoice:
    """One job's result as one choice."""
    asked = Answer.from_stored(row.answer)
    text, finish_reason = row.text or "", row.finish_reason
    ids, logprobs = row.token_ids or [], row.logprobs or []
    pieces = texts.pieces(ids) if asked.with_logprobs else []
    if endpoint == CHAT:
        shown = None
        if asked.with_logprobs:
            found = zip(pieces, logprobs, strict=True)
            shown = ChatLogprobs([ChatLogprob(piece, one, list(piece.encode()), []) for piece, one in found])
        return ChatChoice(index, ChatMessage(text), finish_reason, shown)
    listed = TextLogprobs(pieces, list(logprobs), None, _offsets(pieces)) if asked.with_logprobs else None
    return TextChoice(index, text, finish_reason, listed)


def usage_of(rows: Sequence[Row[Any]]) -> Usage:
    """The tokens of a request: a prompt counts once, however many samples of it there are."""
    prompt = sum(row.prompt_tokens for row in rows if row.column_idx in (None, 0))
    completion = sum(row.completion_tokens for row in rows)
    return Usage(prompt, completion, prompt + completion)


def completion_of(endpoint: str, rows: Sequence[Row[Any]], base_name: str, texts: TokenTexts) -> Completion:
    """The answer to a request whose jobs have all succeeded. rows: theirs, in order."""
    first = rows[0]
    is_chat = endpoint == CHAT
    choices: list[Any] = [choice_of(endpoint, i, row, texts) for i, row in enumerate(rows)]
    return Completion(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{first.id.hex}",
        object="chat.completion" if is_chat else "text_completion",
        created=int(max(row.finished_at for row in rows).timestamp()),
        model=first.adapter or base_name,
        choices=choices,
        usage=usage_of(rows),
    )


# What an HTTP service would have said; the codes that OpenAI has a word for take it.
_STATUS = {
    ErrorCode.PROMPT_TOO_LONG: (400, "context_length_exceeded"),
    ErrorCode.INVALID_TOKEN: (400, "invalid_token"),
    ErrorCode.ADAPTER_UNAVAILABLE: (503, "adapter_unavailable"),
    ErrorCode.ADAPTER_TOO_LARGE: (400, "adapter_too_large"),
    ErrorCode.ADAPTER_QUARANTINED: (400, "adapter_quarantined"),
    ErrorCode.JOB_QUARANTINED: (400, "job_quarantined"),
    ErrorCode.NUMERICAL: (500, "numerical"),
    ErrorCode.ENGINE: (500, "engine"),
}


def failure_of(row: Row[Any]) -> tuple[int, OpenAIError]:
    """(status, error) of a job that failed."""
    code = ErrorCode(row.error_code)
    status, shown = _STATUS.get(code, (503 if code in RETRYABLE else 500, code.value))
    return status, error_of(status, shown, row.error_message or shown)


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


def _offsets(pieces: Sequence[str]) -> list[int]:
    offsets, at = [], 0
    for piece in pieces:
        offsets.append(at)
        at += len(piece)
    return offsets
