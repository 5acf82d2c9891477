"""Token ids as texts, for answers that show log-probabilities. Knows the model's tokenizer and nothing of jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from medley.config import Settings

_ANCHOR = "a"  # before a token: some decoders take the blank from the beginning of a text
_BROKEN = "\ufffd"  # what a decoder puts for bytes that are no whole character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a single byte, as vocabularies with byte fallback spell it


class TokenText(NamedTuple):
    """A token by itself. One that ends within a character is shown by its bytes, as OpenAI does."""

    text: str
    bytes: list[int] | None  # None where only the vocabulary's spelling is known

    @property
    def num_chars(self) -> int:
        """How many characters of a text begin in it."""
        return len(self.text) if self.bytes is None else sum(byte & 0xC0 != 0x80 for byte in self.bytes)


class TokenTexts:
    """Read when it is first used: most answers show no tokens. Safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        self._path = model_dir / "tokenizer.json"
        self._known: dict[int, TokenText] = {}

    @classmethod
    def open(cls, settings: Settings) -> TokenTexts:
        """Of the model that a process is configured with."""
        return cls(Path(settings.model or "."))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._path))

    @cached_property
    def _anchor(self) -> tuple[int, int]:
        """(the id of a token before which nothing is, the length of its text)."""
        token = self._tokenizer.encode(_ANCHOR, add_special_tokens=False).ids[-1]
        return token, len(self._decode([token]))

    def texts(self, token_ids: Sequence[int]) -> list[TokenText]:
        """Each token by itself: one has the same text wherever it stands."""
        return [self._known.get(token) or self._learn(token) for token in token_ids]

    def joined(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that was given as tokens."""
        return self._decode(token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _learn(self, token: int) -> TokenText:
        anchor, num_chars = self._anchor
        text = self._decode([anchor, token])[num_chars:]
        if _BROKEN not in text:
            found = TokenText(text, list(text.encode()))
        else:
            spelling = self._tokenizer.id_to_token(token) or ""
            raw = _bytes_of(spelling)
            shown = spelling if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            found = TokenText(shown, raw)
        self._known[token] = found
        return found


def _bytes_of(spelling: str) -> list[int] | None:
    """The bytes of a token that a vocabulary spells as a byte, or in GPT-2's alphabet of 256 printable characters."""
    if (one := _BYTE.fullmatch(spelling)) is not None:
        return [int(one[1], 16)]
    found = [_ALPHABET.get(char) for char in spelling]
    return None if None in found or not found else [byte for byte in found if byte is not None]


def _alphabet() -> dict[str, int]:
    """Character -> byte. Printable bytes of Latin-1 stand for themselves, the others for characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()
