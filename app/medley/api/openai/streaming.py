"""An answer as server-sent events, for clients that ask to stream.

Results come whole, so the text is one chunk; after it the end of each choice, the usage where it is asked for, and
[DONE]. What goes wrong is an ordinary answer with its status, since nothing is sent before the result is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import Response

from medley.api.openai.choices import ChatCompletion, CompletionUsage, TextChoice, TextCompletion
from medley.api.openai.logprobs import ChatLogprobs, TextLogprobs


class _Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _ChatChunkChoice(msgspec.Struct):
    index: int
    delta: _Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class _TextChunkChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None


class _Chunk(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: CompletionUsage | None = None


def event_stream(found: TextCompletion | ChatCompletion, *, with_usage: bool) -> Response:
    """`found` as the events of a stream."""
    events = [b"data: " + msgspec.json.encode(chunk) for chunk in _chunks(found, with_usage)]
    body = b"\n\n".join([*events, b"data: [DONE]", b""])
    return Response(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _chunks(found: TextCompletion | ChatCompletion, with_usage: bool) -> Iterator[_Chunk]:
    kind = "chat.completion.chunk" if isinstance(found, ChatCompletion) else found.object

    def chunk(choices: list[Any], usage: CompletionUsage | None = None) -> _Chunk:
        return _Chunk(found.id, kind, found.created, found.model, choices, usage)

    if isinstance(found, ChatCompletion):
        for choice in found.choices:
            delta = _Delta(role=choice.message.role, content=choice.message.content)
            yield chunk([_ChatChunkChoice(choice.index, delta, logprobs=choice.logprobs)])
            yield chunk([_ChatChunkChoice(choice.index, _Delta(), choice.finish_reason)])
    else:
        for text_choice in found.choices:
            yield chunk([_text(text_choice, text_choice.text, logprobs=text_choice.logprobs)])
            yield chunk([_text(text_choice, "", text_choice.finish_reason)])
    if with_usage:
        yield chunk([], found.usage)


def _text(
    choice: TextChoice, text: str, finish_reason: str | None = None, logprobs: TextLogprobs | None = None
) -> _TextChunkChoice:
    return _TextChunkChoice(choice.index, text, finish_reason, logprobs)
