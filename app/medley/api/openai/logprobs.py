"""Log-probabilities as OpenAI's answers show them: from token ids and numbers to lists by text.

Knows rows of `results.read_answers` and `tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import msgspec
from sqlalchemy import Row

from medley.api.openai.tokens import TokenText, TokenTexts
from medley.api.shapes import details_of

# The likeliest tokens of each place, each with its log-probability; None before a prompt's first token.
_Tops = list[list[tuple[int, float]] | None]


class TextLogprobs(msgspec.Struct):
    """Of a completion: a list an aspect. Nothing is before a prompt's first token, so its log-probability is null;
    `top_logprobs` is null where no alternatives were asked for, else each token's own is among them.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


def chat_logprobs(row: Row[Any], texts: TokenTexts) -> ChatLogprobs:
    """Of one result."""
    found = details_of(row)
    own = list(_token_logprobs(list(zip(row.token_ids or (), row.logprobs or (), strict=True)), texts))
    tops = _tops(found.top_token_ids, found.top_logprobs) or [None] * len(own)
    return ChatLogprobs(
        [
            ChatLogprob(one.token, one.logprob, one.bytes, list(_token_logprobs(top or [], texts)))
            for one, top in zip(own, tops, strict=True)
        ]
    )


def text_logprobs(row: Row[Any], prompt: str, texts: TokenTexts) -> TextLogprobs:
    """Of one result; `prompt` stands before its text, or is empty."""
    found = details_of(row)
    ids: list[int] = list(row.token_ids or ())
    logprobs: list[float | None] = list(row.logprobs or ())
    tops = _tops(found.top_token_ids, found.top_logprobs)
    num_prompt = 0
    if found.prompt_token_ids is not msgspec.UNSET and found.prompt_logprobs is not msgspec.UNSET:
        num_prompt = len(found.prompt_token_ids)
        ids, logprobs = found.prompt_token_ids + ids, found.prompt_logprobs + logprobs
        before = _tops(found.prompt_top_token_ids, found.prompt_top_logprobs)
        # A prompt of one token has none, and so has a job that generates nothing.
        if before is not None or tops is not None:
            tops = (before or [None] * num_prompt) + (tops or [])
    tokens = texts.texts(ids)
    by_token = None
    if tops is not None:
        places = zip(tokens, ids, logprobs, tops, strict=True)
        by_token = [_by_text(text, own, logprob, top, texts) for (text, _), own, logprob, top in places]
    # Special tokens that were put before a text are no part of it.
    added = max(0, sum(token.num_chars for token in tokens[:num_prompt]) - len(prompt))
    return TextLogprobs([token.text for token in tokens], logprobs, by_token, _offsets(tokens, -added))


def _token_logprobs(found: Sequence[tuple[int, float]], texts: TokenTexts) -> Iterator[TokenLogprob]:
    for (text, raw), (_, logprob) in zip(texts.texts([id_ for id_, _ in found]), found, strict=True):
        yield TokenLogprob(text, logprob, raw)


def _tops(ids: Any, logprobs: Any) -> _Tops | None:
    if ids is msgspec.UNSET:
        return None
    return [
        None if place is None else list(zip(place, found, strict=True))
        for place, found in zip(ids, logprobs, strict=True)
    ]


def _by_text(
    text: str, own: int, logprob: float | None, top: list[tuple[int, float]] | None, texts: TokenTexts
) -> dict[str, float] | None:
    """Alternatives by their text, the likeliest first, the token's own among them; of one text the likeliest."""
    if top is None or logprob is None:
        return None
    found = {text: logprob}
    others = [(id_, value) for id_, value in top if id_ != own]
    for other, (_, value) in zip(texts.texts([id_ for id_, _ in others]), others, strict=True):
        found.setdefault(other.text, value)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _offsets(tokens: Sequence[TokenText], start: int) -> list[int]:
    """Where in the text each token begins, the first at `start`; what is before the text is at its beginning."""
    begins = accumulate((token.num_chars for token in tokens), initial=start)
    return [max(0, at) for at, _ in zip(begins, tokens, strict=False)]
