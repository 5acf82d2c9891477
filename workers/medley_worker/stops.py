"""Stop strings: text from tokens as they arrive, and the earliest match in it.

Used by the worker's shell and by offline generation. Knows tokenizers; nothing of torch, jobs or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# A UTF-8 character has at most 4 bytes, so a token that still looks cut after 4 more is not a part of one.
_MAX_PENDING_TOKENS = 4
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop string cut the output.

    text: the output before the stop string. num_tokens: generated tokens up to and including the one that
    completed it; these are kept and billed, later ones are dropped.
    """

    text: str
    num_tokens: int


class IncrementalText:
    """The text of a growing list of tokens, without decoding the whole list at each one.

    A token's text can depend on the one before it (spaces), and a character can be spread over tokens. So
    each piece is the difference of two decodings of a short window, held back while it ends in a cut one.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context_at = 0  # tokens from here on are decoded again as context
        self._pending_at = 0  # tokens from here on have given no text yet

    def append(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token_id)
        return self._advance(is_final=len(self._ids) - self._pending_at > _MAX_PENDING_TOKENS)

    def finish(self) -> str:
        """The text of tokens that were held back."""
        return self._advance(is_final=True)

    def _advance(self, *, is_final: bool) -> str:
        context = self._decode(self._context_at, self._pending_at)
        whole = self._decode(self._context_at, len(self._ids))
        if len(whole) <= len(context) or (whole.endswith(_REPLACEMENT) and not is_final):
            return ""
        self._context_at = self._pending_at
        self._pending_at = len(self._ids)
        return whole[len(context) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True) if end > start else ""


class StopMatcher:
    """Looks for `stops` in the text of one job's output.

    min_tokens: a stop string that is complete within this many tokens does not count.
    The result depends on the tokens alone, not on how they were cut into `feed` calls.
    """

    def __init__(self, tokenizer: Detokenizer, stops: Sequence[str], *, min_tokens: int = 0) -> None:
        self._stream = IncrementalText(tokenizer)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""

    @property
    def num_tokens(self) -> int:
        """Tokens fed so far."""
        return self._num_tokens

    @property
    def text(self) -> str:
        """The text so far, without a character that is not complete yet."""
        return self._text

    def feed(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take the next tokens; the earliest match, if there is one. Feed nothing after a match."""
        for token_id in token_ids:
            self._num_tokens += 1
            match = self._match(self._stream.append(token_id))
            if match is not None:
                return match
        return None

    def finish(self) -> StopMatch | None:
        """The output has ended by itself: take the text held back too. `text` is whole afterwards."""
        return self._match(self._stream.finish())

    def _match(self, piece: str) -> StopMatch | None:
        if not piece:
            return None
        num_old = len(self._text)
        self._text += piece
        if self._num_tokens <= self._min_tokens:
            return None
        starts = [
            start
            for stop in self._stops
            # Only matches that end in the new piece: an older one would have been found when it came.
            if (start := self._text.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        ]
        return StopMatch(self._text[: min(starts)], self._num_tokens) if starts else None
