"""Owns the rows: up to `num_rows` running sequences, each at a row index that stays its own while it runs.

One numpy array a property, indexed by row, so that a step touches all its rows in a few array operations
instead of a Python loop. Knows nothing of the waiting line, of tensors or of messages.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from medley.spec.sampling import MAX_STOP, SamplingParams
from medley_worker.engine.plans import Chunk, Rows
from medley_worker.engine.results import Scores, Tops
from medley_worker.engine.sequences import Logprobs, Sequence, Tokens

NO_TOKEN = -1  # pads stop_ids; token ids are 0 or more, so it matches none


def is_plain(sampling: SamplingParams) -> bool:
    """Whether the next token is the argmax of the model's own logits."""
    return (
        sampling.temperature == 0.0
        and not needs_output(sampling)
        and not sampling.logit_bias
        and sampling.min_tokens == 0
    )


def needs_output(sampling: SamplingParams) -> bool:
    """Whether the draw of the next token reads the output tokens before it."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class RowTable:
    """Rows of running sequences.

    | array | who writes it |
    | token_ids, logprobs [num_rows, max_len] | this table; [:prompt_len] is the prompt, [:num_known] is there |
    | page_table [num_rows, max_pages] | the scheduler; the first num_pages of a row are held |
    | num_computed, is_decoding | the scheduler, through `advance` |
    """

    def __init__(self, num_rows: int, max_len: int, page_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.num_rows = num_rows
        self.max_len = max_len
        self.page_size = page_size
        self.eos_token_ids = eos_token_ids
        # np.empty maps memory lazily: what no sequence reaches costs nothing.
        self.token_ids = np.empty((num_rows, max_len), np.int32)
        self.logprobs = np.empty((num_rows, max_len), np.float32)
        self.page_table = np.zeros((num_rows, -(-max_len // page_size)), np.int32)
        self.num_pages = np.zeros(num_rows, np.int64)
        self.num_tokens = np.zeros(num_rows, np.int64)  # prompt and output, tokens in flight included
        self.num_known = np.zeros(num_rows, np.int64)  # of which are in token_ids
        self.num_computed = np.zeros(num_rows, np.int64)  # tokens whose K and V are in pages
        self.prompt_len = np.zeros(num_rows, np.int64)
        self.stop_len = np.zeros(num_rows, np.int64)  # num_tokens at which it ends by length
        self.min_len = np.zeros(num_rows, np.int64)  # num_tokens up to which end tokens are masked
        self.stop_ids = np.full((num_rows, MAX_STOP + len(eos_token_ids)), NO_TOKEN, np.int64)
        self.is_decoding = np.zeros(num_rows, np.bool_)
        self.is_streamed = np.zeros(num_rows, np.bool_)
        self.is_plain = np.ones(num_rows, np.bool_)
        self.needs_output = np.zeros(num_rows, np.bool_)  # its draw reads its output tokens
        self.is_guided = np.zeros(num_rows, np.bool_)  # its draw takes a grammar that has seen its newest token
        self.is_pending = np.zeros(num_rows, np.bool_)  # its newest token is in flight: a gap in token_ids
        self.is_complete = np.zeros(num_rows, np.bool_)  # its last token by length is in flight
        self.tenure = np.zeros(num_rows, np.int64)  # new for each sequence that holds the row
        self.is_drawn = np.ones(num_rows, np.bool_)  # else it ends when its prompt is scored
        self.next_target = np.zeros(num_rows, np.int64)  # the next prompt token to be scored; prompt_len: none
        self.num_top = np.zeros(num_rows, np.int64)  # alternatives wanted beside each drawn token
        self.adapter_index = np.zeros(num_rows, np.int64)  # 0: the base; else the scheduler's index of the adapter
        self.seed = np.zeros(num_rows, np.int64)
        self.sequences: list[Sequence | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_rows - len(self._free)

    def acquire(self, sequence: Sequence, adapter_index: int, pages: list[int]) -> int:
        """Give `sequence` a row, with its tokens and `pages` in it. The caller has looked at `num_free`."""
        row = self._free.pop()
        prompt_len, num_tokens = len(sequence.prompt), sequence.num_tokens
        tokens = self.token_ids[row]
        tokens[:prompt_len] = sequence.prompt
        if num_tokens > prompt_len:
            tokens[prompt_len:num_tokens] = sequence.output_ids
            self.logprobs[row, prompt_len:num_tokens] = sequence.output_logprobs
        self.page_table[row, : len(pages)] = pages
        self.num_pages[row] = len(pages)
        self.num_tokens[row] = self.num_known[row] = num_tokens
        self.num_computed[row] = 0
        self.prompt_len[row] = prompt_len
        sampling = sequence.sampling
        self.stop_len[row] = min(prompt_len + sampling.max_tokens, self.max_len)
        if not sequence.is_drawn:
            self.stop_len[row] = prompt_len + 1  # never reached
        self.min_len[row] = prompt_len + sampling.min_tokens
        self.is_decoding[row] = False
        self.is_streamed[row] = sequence.is_streamed
        self.is_guided[row] = sequence.matcher is not None
        self.is_plain[row] = is_plain(sampling) and sequence.matcher is None
        self.needs_output[row] = needs_output(sampling)
        self.is_pending[row] = self.is_complete[row] = False
        findings = sequence.findings
        self.is_drawn[row] = sequence.is_drawn
        self.next_target[row] = prompt_len if findings is None else findings.num_scored
        self.num_top[row] = 0 if findings is None else findings.num_top
        self.adapter_index[row] = adapter_index
        self.seed[row] = sequence.seed
        ends = (() if sampling.ignore_eos else self.eos_token_ids) + sampling.stop_token_ids
        self.stop_ids[row] = NO_TOKEN
        if ends:
            self.stop_ids[row, : len(ends)] = ends
        self.sequences[row] = sequence
        sequence.row = row
        return row

    def release(self, row: int) -> tuple[Sequence, list[int]]:
        """Take the row back; its tokens go to the sequence, but for those in flight. Returns it and the row's pages."""
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is released twice"
        sequence.output_ids, sequence.output_logprobs = self.output(row)
        sequence.row = None
        pages: list[int] = self.page_table[row, : self.num_pages[row]].tolist()
        self.num_pages[row] = 0
        self.is_decoding[row] = self.is_pending[row] = self.is_complete[row] = self.is_guided[row] = False
        self.tenure[row] += 1
        self.sequences[row] = None
        self._free.append(row)
        return sequence, pages

    def output(self, row: int) -> tuple[Tokens, Logprobs]:
        """Copies of the tokens generated and read so far, with their log-probabilities."""
        span = slice(int(self.prompt_len[row]), int(self.num_known[row]))
        return self.token_ids[row, span].copy(), self.logprobs[row, span].copy()

    def add_page(self, row: int, page: int) -> None:
        self.page_table[row, self.num_pages[row]] = page
        self.num_pages[row] += 1

    def expect(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Count one new token for each of `rows` ([R]) that `write` brings later. Returns their places [R]."""
        places = self.num_tokens[rows]
        num_tokens = places + 1
        self.num_tokens[rows] = num_tokens
        self.is_pending[rows] = True
        self.is_complete[rows] = num_tokens >= self.stop_len[rows]
        return places

    def write(
        self, rows: Rows, places: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64], logprobs: Logprobs
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Write the expected tokens, oldest first where a row has several in flight.

        All [R]. Returns per row (ended by an end token, ended by length).
        """
        self.token_ids[rows, places] = token_ids
        self.logprobs[rows, places] = logprobs
        num_known = places + 1
        self.num_known[rows] = num_known
        self.is_pending[rows] = num_known < self.num_tokens[rows]
        is_stop = (self.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        if is_stop.any():
            is_stop &= num_known > self.min_len[rows]
        return is_stop, num_known >= self.stop_len[rows]

    def write_tops(self, rows: Rows, is_kept: npt.NDArray[np.bool_], tops: Tops) -> None:
        """Hand the likeliest tokens [n, k] to those of `rows` [R] that want them (n of them), where they are kept."""
        topped = np.flatnonzero(self.num_top[rows] > 0)
        for i, at in enumerate(topped.tolist()):
            sequence = self.sequences[rows[at]] if is_kept[at] else None
            if sequence is not None:
                assert sequence.findings is not None
                sequence.findings.put_new(tops.token_ids[i], tops.logprobs[i])

    def write_scores(
        self, chunks: Seq[Chunk], tenures: npt.NDArray[np.int64], scores: Scores
    ) -> tuple[list[int], list[int]]:
        """Hand the chunks' scores to their rows, but where another sequence holds the row.

        Returns (rows whose logits held NaN, rows that are scored to their ends and draw nothing).
        """
        bad, ended, start = [], [], 0
        for chunk, tenure in zip(chunks, tenures.tolist(), strict=True):
            part, start = slice(start, start + chunk.num_targets), start + chunk.num_targets
            sequence = self.sequences[chunk.row] if self.tenure[chunk.row] == tenure else None
            if sequence is None:
                continue
            if scores.is_bad[part].any():
                bad.append(chunk.row)
                continue
            findings = sequence.findings
            assert findings is not None
            if scores.tops is not None and findings.num_scored_top:
                findings.put_tops(chunk.first_target, scores.tops.token_ids[part], scores.tops.logprobs[part])
            findings.put_scores(chunk.first_target, scores.logprobs[part], scores.is_best[part])
            if not self.is_drawn[chunk.row] and findings.num_scored == self.prompt_len[chunk.row]:
                ended.append(chunk.row)
        return bad, ended

    def held_pages(self) -> list[int]:
        return [int(p) for row in range(self.num_rows) for p in self.page_table[row, : self.num_pages[row]]]

    def check_integrity(self) -> None:
        """Free rows hold nothing; each used row has a sequence that knows it, and pages for its K, V."""
        free = set(self._free)
        assert len(free) == len(self._free), "a row is free twice"
        for row, sequence in enumerate(self.sequences):
            if sequence is None:
                assert row in free, f"row {row} is neither free nor used"
                assert self.num_pages[row] == 0, f"free row {row} holds pages"
                assert not self.is_decoding[row], f"free row {row} decodes"
                continue
            assert row not in free, f"row {row} is free and used"
            assert sequence.row == row, f"the sequence of row {row} thinks it holds row {sequence.row}"
            assert self.num_computed[row] <= self.num_pages[row] * self.page_size, f"row {row} computed past its pages"
            assert self.num_computed[row] < self.num_tokens[row], f"row {row} computed past its tokens"
            assert self.num_known[row] < self.stop_len[row], f"row {row} should have ended"
            assert self.num_tokens[row] <= self.stop_len[row], f"row {row} goes on past its end"
            assert self.is_pending[row] == (self.num_known[row] < self.num_tokens[row]), f"row {row} is miscounted"
            is_long = self.num_tokens[row] == self.stop_len[row]
            is_scored = not self.is_drawn[row] and self.is_decoding[row]
            assert self.is_complete[row] == (is_long or is_scored), f"row {row} ends unmarked"
            if self.is_decoding[row]:
                assert self.num_computed[row] == self.num_tokens[row] - 1, f"row {row} decodes with a gap"
