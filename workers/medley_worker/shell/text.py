"""Text and tokens: prompts in, outputs out, stop strings on the way. Knows a tokenizer, nothing of jobs.

A model folder's own tokenizer.json says everything: special tokens around a prompt, normalisation, decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from medley.spec.jobs import Checkpoint
from medley_worker.stops import StopMatch, StopMatcher


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

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, with the special tokens that the tokenizer adds by itself."""
        if not prompts:
            return []
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(prompts))]

    def decode(self, outputs: Sequence[Sequence[int]]) -> list[str]:
        """The text of each output, without special tokens."""
        return list(self.tokenizer.decode_batch(outputs, skip_special_tokens=True)) if outputs else []


class StopWatch:
    """One job's output as it arrives, watched for its stop strings; keeps every token up to the match."""

    def __init__(
        self, codec: TextCodec, stops: Sequence[str], *, min_tokens: int, checkpoint: Checkpoint | None
    ) -> None:
        self._matcher = StopMatcher(codec.tokenizer, stops, min_tokens=min_tokens)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.match: StopMatch | None = None
        if checkpoint is not None:
            self.feed(checkpoint.token_ids, checkpoint.logprobs)

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Take the next tokens. True where a stop string is complete; tokens after it are dropped."""
        if self.match is None:
            self.token_ids += token_ids
            self.logprobs += logprobs
            self.match = self._matcher.feed(token_ids)
            self._cut()
        return self.match is not None

    def finish(self, token_ids: Sequence[int], logprobs: Sequence[float], *, has_end_token: bool) -> str:
        """The output has ended by itself: all its tokens. Returns the text; `match` says whether a stop cut it.

        has_end_token: the last token ended the output and is no part of the text.
        """
        num_fed = len(self.token_ids)
        num_text = len(token_ids) - has_end_token
        if not self.feed(token_ids[num_fed:num_text], logprobs[num_fed:num_text]):
            self.match = self._matcher.finish()
            self._cut()
        if self.match is not None:
            return self.match.text
        self.token_ids, self.logprobs = list(token_ids), list(logprobs)
        return self._matcher.text

    def _cut(self) -> None:
        if self.match is not None:
            del self.token_ids[self.match.num_tokens :]
            del self.logprobs[self.match.num_tokens :]
