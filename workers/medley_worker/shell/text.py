"""Text and tokens: prompts in, outputs out, in batches. Knows a tokenizer, nothing of jobs.

A model folder's own tokenizer.json says everything: special tokens around a prompt, normalisation, decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class TokenizerMissing(Exception):
    """The model folder has no tokenizer that can be read."""


class TextCodec:
    """The model's tokenizer, in batches. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Files carry the settings of their training; a prompt is neither cut nor filled up.
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def load(cls, model_dir: Path) -> TextCodec:
        """Raises TokenizerMissing."""
        path = model_dir / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the Rust binding raises plain Exception
            raise TokenizerMissing(f"cannot read {path}: {error}; a worker needs the model's tokenizer.json") from error

    def encode(self, prompts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each prompt, with the special tokens that the tokenizer adds by itself, or without."""
        if not prompts:
            return []
        encodings = self.tokenizer.encode_batch_fast(list(prompts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pair(
        self, prompt: str | Sequence[int], continuation: str | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of the continuation to be scored after it; each is text or ids already.

        Two texts are tokenised as lm-evaluation-harness does: blanks at the prompt's end count to the continuation,
        whose tokens are those of the whole text after as many as the prompt alone has. Beside ids a text is tokenised
        apart, a continuation without special tokens.
        """
        if not isinstance(continuation, str):
            return self._prompt_ids(prompt), list(continuation)
        if not isinstance(prompt, str):
            return list(prompt), self.tokenizer.encode(continuation, add_special_tokens=False).ids
        bare = prompt.rstrip()
        before, whole = self.encode([bare, prompt + continuation])
        return before, whole[len(before) :]

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.encode([prompt])[0] if isinstance(prompt, str) else list(prompt)

    def decode(self, outputs: Sequence[Sequence[int]]) -> list[str]:
        """The text of each output, without special tokens."""
        return list(self.tokenizer.decode_batch(outputs, skip_special_tokens=True)) if outputs else []
