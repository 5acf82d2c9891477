"""Token ids as texts, for answers that show log-probabilities. Knows the model's tokenizer and nothing of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TokenTexts:
    """Read when it is first used: most answers show no tokens. Safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        self._path = model_dir / "tokenizer.json"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._path))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text. One that ends within a character adds nothing, its last one the whole."""
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in token_ids]
