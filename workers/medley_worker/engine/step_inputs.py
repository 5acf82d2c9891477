"""What one step on CUDA is given, as plain arrays: which rows, padded how, and where each number lies in one block.

Decode rows come first, padded to a row bucket, then the chunks; padded rows hold one token and read and write the
spare page alone. All arrays of a step lie in one int32 block, so that one copy brings them to the device, each at
a fixed place, where captured graphs read them. Pure numpy but for views of tensors; knows no streams.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.rows import NO_TOKEN, RowTable

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Array = TypeVar("Array", Int32s, Tensor)

# (rows up to, step between buckets): a padded row costs little, a captured graph memory and time at start-up.
BUCKET_STEPS = ((64, 8), (128, 16), (256, 32))
LAST_BUCKET_STEP = 64
# Of steps with prompt chunks, by tokens. The last: a longer step takes the device longer than the host to launch.
TOKEN_BUCKETS = (*range(16, 256, 16), *range(256, 513, 32))
ALIGNMENT = 4  # numbers: 16 bytes


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending numbers of rows that decode steps are padded to; the last is `max_rows`."""
    buckets = [1, 2, 4, 8]
    while buckets[-1] < max_rows:
        step = next((step for end, step in BUCKET_STEPS if buckets[-1] < end), LAST_BUCKET_STEP)
        buckets.append(buckets[-1] + step)
    return (*(bucket for bucket in buckets if bucket < max_rows), max_rows)


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Ascending numbers of tokens that steps with prompt chunks, of up to `max_tokens`, are padded to."""
    return TOKEN_BUCKETS[: bisect_left(TOKEN_BUCKETS, max_tokens) + 1]


def bucket_for(buckets: Sequence[int], num_rows: int) -> int:
    """The smallest bucket that holds so many rows; 0 for none."""
    return buckets[bisect_left(buckets, num_rows)] if num_rows else 0


@dataclass(frozen=True, slots=True)
class StepContents:
    """One step. B sequences: padded decode rows, then chunks. T: tokens, padding included."""

    num_decode_rows: int  # padded
    num_real_rows: int  # of which are rows of sequences
    token_ids: Int32s  # [T]; NO_TOKEN: the device has it, as the row's last token
    sequence_rows: Ints  # [B] the row behind each sequence; the spare one where padded
    token_rows: Ints  # [num_decode_rows] where each decode row's last token is kept; the spare row where it has none
    num_new: Ints  # [B]
    kv_len: Ints  # [B] with the new tokens
    kv_indices: Int32s  # pages, sequence by sequence
    logit_rows: Ints  # [R] token rows that a token is drawn after
    sampled_rows: Ints  # [R] and the rows they belong to

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.num_new)


def step_contents(
    plan: StepPlan, sampled: Rows, rows: RowTable, buckets: Sequence[int], spare_page: int
) -> StepContents:
    """The contents of a plan's step. sampled: the rows that draw a token, in the plan's order."""
    decode, chunk_rows = plan.decode_rows, np.array([chunk.row for chunk in plan.chunks], np.int64)
    bucket = bucket_for(buckets, len(decode))
    num_padded = bucket - len(decode)
    chunk_new = np.array([chunk.num_tokens for chunk in plan.chunks], np.int64)
    kv_len = np.concatenate(
        [rows.num_computed[decode] + 1, np.ones(num_padded, np.int64), rows.num_computed[chunk_rows] + chunk_new]
    )
    num_pages = -(-kv_len // rows.page_size)
    newest = rows.token_ids[decode, rows.num_computed[decode]]
    token_ids = [np.where(rows.is_pending[decode], NO_TOKEN, newest), np.zeros(num_padded, np.int32)]
    token_ids += [rows.token_ids[c.row, c.start : c.start + c.num_tokens] for c in plan.chunks]
    kv_indices = [
        held_pages(rows, decode, num_pages[: len(decode)]),
        np.full(num_padded, spare_page, np.int32),
        held_pages(rows, chunk_rows, num_pages[bucket:]),
    ]
    is_last = np.array([chunk.is_last for chunk in plan.chunks], np.bool_)
    chunk_ends = bucket + np.cumsum(chunk_new)
    padding = np.full(num_padded, rows.num_rows, np.int64)
    return StepContents(
        num_decode_rows=bucket,
        num_real_rows=len(decode),
        token_ids=np.concatenate(token_ids),
        sequence_rows=np.concatenate([decode, padding, chunk_rows]),
        token_rows=np.concatenate([decode, padding]),
        num_new=np.concatenate([np.ones(bucket, np.int64), chunk_new]),
        kv_len=kv_len,
        kv_indices=np.concatenate(kv_indices),
        logit_rows=np.concatenate([np.arange(len(decode)), chunk_ends[is_last] - 1]),
        sampled_rows=sampled,
    )


def empty_contents(num_decode_rows: int, chunk_len: int, spare_row: int, spare_page: int) -> StepContents:
    """A step of padding alone, to warm up and to capture. chunk_len: tokens of one chunk in the spare page, or 0."""
    chunks = np.full(int(chunk_len > 0), chunk_len, np.int64)
    num_new = np.concatenate([np.ones(num_decode_rows, np.int64), chunks])
    no_rows = np.zeros(0, np.int64)
    return StepContents(
        num_decode_rows=num_decode_rows,
        num_real_rows=0,
        token_ids=np.zeros(num_decode_rows + chunk_len, np.int32),
        sequence_rows=np.full(len(num_new), spare_row, np.int64),
        token_rows=np.full(num_decode_rows, spare_row, np.int64),
        num_new=num_new,
        kv_len=num_new,
        kv_indices=np.full(len(num_new), spare_page, np.int32),
        logit_rows=no_rows,
        sampled_rows=no_rows,
    )


def held_pages(rows: RowTable, of: Rows, num_pages: Ints) -> Int32s:
    """The first num_pages [n] pages of each row, one after the other."""
    if len(of) == 0:
        return np.zeros(0, np.int32)
    table = rows.page_table[of, : int(num_pages.max())]
    pages: Int32s = table[np.arange(table.shape[1]) < num_pages[:, None]]
    return pages


@dataclass(frozen=True, slots=True)
class StepFields(Generic[Array]):
    """A block cut into a step's arrays, each as long as a step may need it. int32."""

    token_ids: Array  # [T]
    positions: Array  # [T]
    sequences: Array  # [T] the sequence of each token
    token_rows: Array  # [R]
    logit_rows: Array  # [R]
    sampled_rows: Array  # [R]
    kv_indptr: Array  # [B+1]
    last_page_len: Array  # [B]
    qo_indptr: Array  # [C+1] of the chunks, from 0
    kv_len: Array  # [B]
    kv_indices: Array  # [K], the last: a copy ends with the pages in use


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Capacities of a step, in numbers of each."""

    max_tokens: int
    max_rows: int  # decode rows, padded, and rows that draw a token
    max_sequences: int
    max_pages: int

    def _lengths(self) -> list[int]:
        tokens, rows, sequences = self.max_tokens, self.max_rows, self.max_sequences
        of_rows, of_sequences = [rows] * 3, [sequences + 1, sequences, sequences + 1, sequences]
        return [*[tokens] * 3, *of_rows, *of_sequences, self.max_pages]

    def _starts(self) -> list[int]:
        starts = [0]
        for length in self._lengths():
            starts.append(starts[-1] + -(-length // ALIGNMENT) * ALIGNMENT)
        return starts

    @property
    def num_ints(self) -> int:
        """Numbers in a block."""
        return self._starts()[-1]

    def cut(self, block: Array) -> StepFields[Array]:
        """Views into a block [num_ints] int32."""
        return StepFields(*(block[a : a + n] for a, n in zip(self._starts()[:-1], self._lengths(), strict=True)))

    def write(self, contents: StepContents, block: Int32s, page_size: int) -> int:
        """Lay a step out in a block. Returns how many of its first numbers a copy must bring."""
        into = self.cut(block)
        num_sequences, num_tokens = contents.num_sequences, contents.num_tokens
        num_pages = -(-contents.kv_len // page_size)
        ends = np.cumsum(contents.num_new)
        into.token_ids[:num_tokens] = contents.token_ids
        into.positions[:num_tokens] = np.arange(num_tokens) - np.repeat(ends - contents.kv_len, contents.num_new)
        into.sequences[:num_tokens] = np.repeat(np.arange(num_sequences), contents.num_new)
        into.token_rows[: contents.num_decode_rows] = contents.token_rows
        into.logit_rows[: len(contents.logit_rows)] = contents.logit_rows
        into.sampled_rows[: len(contents.sampled_rows)] = contents.sampled_rows
        into.kv_indptr[0] = 0
        into.kv_indptr[1 : num_sequences + 1] = np.cumsum(num_pages)
        into.last_page_len[:num_sequences] = contents.kv_len - (num_pages - 1) * page_size
        into.qo_indptr[0] = 0
        num_chunks = num_sequences - contents.num_decode_rows
        into.qo_indptr[1 : num_chunks + 1] = ends[contents.num_decode_rows :] - contents.num_decode_rows
        into.kv_len[:num_sequences] = contents.kv_len
        into.kv_indices[: len(contents.kv_indices)] = contents.kv_indices
        return self._starts()[-2] + len(contents.kv_indices)
