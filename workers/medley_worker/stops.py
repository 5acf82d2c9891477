"""Stop strings: text from tokens as they arrive, and the earliest match in it.

Used by the worker's shell and by offline generation. Knows tokenizers; nothing of torch, jobs or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from medley.spec.jobs import Checkpoint, Details

_REPLACEMENT = "\ufffd"  # what stands for bytes that are no character, or not yet
# A UTF-8 character has at most 4 bytes, so one that is not complete shows as at most 3 of these. While it is not,
# some decoders (byte fallback) show the characters before it as such too: after 4 tokens it must have come.
_MAX_BYTES = 4
# Tokens decoded at a time while no boundary of characters is in sight, and how many of them are kept then.
_MAX_WINDOW, _KEPT_WINDOW = 24, 12


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

    A token's text can depend on the one before it (spaces), and a character can be spread over tokens. So a
    short window of tokens is decoded, what it has already given is skipped, and what may be a part of a
    character at its end is held back.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window
        self._num_context = 0  # its first tokens, whose text was all given
        self._text = ""  # of the window
        self._num_given = 0  # its first characters, that were given

    def append(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token_id)
        text = self._decode()
        num_held = _num_broken(text)
        if len(self._ids) - self._num_context > _MAX_BYTES:
            num_held = min(num_held, _MAX_BYTES - 1)
        if text and text == self._text and not num_held:
            # A special token, without text; kept, it would be decoded again with each further token.
            self._ids.pop()
            return ""
        self._text = text
        piece = self._give(len(text) - num_held)
        if piece and not num_held:
            self._restart(self._num_context)
        elif len(self._ids) > _MAX_WINDOW:
            self._restart(len(self._ids) - _KEPT_WINDOW)
        return piece

    def finish(self) -> str:
        """The text that was held back."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        piece = self._text[self._num_given : end]
        self._num_given += len(piece)
        return piece

    def _restart(self, start: int) -> None:
        """Begin the window at its token `start`; what was held back stays so."""
        num_held = len(self._text) - self._num_given
        del self._ids[:start]
        self._num_context = len(self._ids)
        self._text = self._decode()
        self._num_given = len(self._text) - min(num_held, _num_broken(self._text))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def _num_broken(text: str) -> int:
    """Replacement characters at the end."""
    return len(text) - len(text.rstrip(_REPLACEMENT))


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


class StopWatch:
    """One output as it arrives, watched for its stop strings; keeps every token up to the match."""

    def __init__(
        self,
        tokenizer: Detokenizer,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._matcher = StopMatcher(tokenizer, stops, min_tokens=min_tokens)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self._details: list[Details] = []  # of the tokens as they came, for a job that asked for more than those
        self._num_detailed = 0  # tokens that they are of
        self.match: StopMatch | None = None
        if checkpoint is not None:
            self.feed(checkpoint.token_ids, checkpoint.logprobs, checkpoint.details)

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[float], details: Details | None = None) -> bool:
        """Take the next tokens. True where a stop string is complete; tokens after it are dropped."""
        if self.match is None:
            self.token_ids += token_ids
            self.logprobs += logprobs
            if details is not None:
                self._details.append(details)
                self._num_detailed += len(token_ids)
            self.match = self._matcher.feed(token_ids)
            self._cut()
        return self.match is not None

    def finish(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        details: Details | None = None,
        *,
        has_end_token: bool,
    ) -> str:
        """The output has ended by itself: all its tokens. Returns the text; `match` says whether a stop cut it.

        has_end_token: the last token ended the output and is no part of the text.
        """
        num_fed = len(self.token_ids)
        num_text = len(token_ids) - has_end_token
        if not self.feed(token_ids[num_fed:num_text], logprobs[num_fed:num_text]):
            self.match = self._matcher.finish()
            self._cut()
        if details is not None:
            self._details, self._num_detailed = [details], len(token_ids)
        if self.match is not None:
            return self.match.text
        self.token_ids, self.logprobs = list(token_ids), list(logprobs)
        return self._matcher.text

    @property
    def details(self) -> Details | None:
        """Of the tokens that are kept, and of the prompt; None for a job that asked for its tokens alone."""
        if not self._details:
            return None
        top_token_ids = [token for part in self._details for token in part.top_token_ids]
        top_logprobs = [logprob for part in self._details for logprob in part.top_logprobs]
        num_kept = len(top_token_ids) // max(1, self._num_detailed) * len(self.token_ids)
        return msgspec.structs.replace(
            self._details[0],  # the prompt's come with the first token
            top_token_ids=tuple(top_token_ids[:num_kept]),
            top_logprobs=tuple(top_logprobs[:num_kept]),
        )

    def _cut(self) -> None:
        if self.match is not None:
            del self.token_ids[self.match.num_tokens :]
            del self.logprobs[self.match.num_tokens :]
