"""What a step on CUDA is given: buckets, padding, page lists and the block, all without a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medley.spec.sampling import SamplingParams
from medley_worker.engine.plans import Chunk, StepPlan
from medley_worker.engine.rows import NO_TOKEN, RowTable
from medley_worker.engine.sequences import Sequence
from medley_worker.engine.step_inputs import (
    TOKEN_BUCKETS,
    BlockLayout,
    StepContents,
    bucket_for,
    empty_contents,
    row_buckets,
    step_contents,
    token_buckets,
)
from medley_worker.engine.token_passes import token_passes
from medley_worker.ops.lora_stage import AdapterTiles
from medley_worker.ops.sgmv import LARGE_ROWS, LARGE_TOKENS, SMALL_ROWS, _block_rows

PAGE, SPARE_PAGE = 4, 99


def test_buckets_grow_with_the_rows_and_end_with_all_of_them() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(6) == (1, 2, 4, 6)
    assert row_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert row_buckets(100)[-3:] == (80, 96, 100)
    assert row_buckets(512)[11:] == (80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def test_steps_with_prompts_have_buckets_up_to_the_longest_step_or_512_tokens() -> None:
    assert token_buckets(9) == (16,)
    assert token_buckets(16) == (16,)
    assert token_buckets(100) == (16, 32, 48, 64, 80, 96, 112)
    assert token_buckets(4096)[-10:] == (240, 256, 288, 320, 352, 384, 416, 448, 480, 512)


def test_a_step_that_replays_graphs_has_the_items_they_were_captured_with() -> None:
    """Others have large items where prompts nearly fill them."""
    adapter = AdapterTiles(0, {}, torch.zeros(1), {})

    def rows(num_decode: int, *chunks: int) -> int:
        num_tokens = [1] * num_decode + list(chunks)
        starts = np.cumsum([0, *num_tokens]).tolist()
        return _block_rows([(adapter, *span) for span in zip(starts, num_tokens, strict=False)], num_tokens)

    assert TOKEN_BUCKETS[-1] < LARGE_TOKENS
    assert rows(0, LARGE_TOKENS - 1) == rows(4 * LARGE_TOKENS) == rows(1, 2) == SMALL_ROWS
    assert rows(0, 1024) == rows(0, *[256] * 8) == rows(4, 2000) == LARGE_ROWS
    assert rows(128, 1920) == rows(172, *[160] * 11) == SMALL_ROWS


@pytest.mark.parametrize("max_rows", [1, 3, 8, 57, 64, 130, 300])
def test_every_number_of_rows_has_the_smallest_bucket_that_holds_it(max_rows: int) -> None:
    buckets = row_buckets(max_rows)
    for num_rows in range(1, max_rows + 1):
        assert bucket_for(buckets, num_rows) == min(b for b in buckets if b >= num_rows)
    assert bucket_for(buckets, 0) == 0


def filled_rows() -> RowTable:
    """Rows 0 to 2 decode with 5, 8 and 9 tokens computed, row 2's newest in flight; row 3 has a prompt of 7."""
    rows = RowTable(6, 32, PAGE, eos_token_ids=())
    for row, length in enumerate((6, 9, 10, 7)):
        sequence = Sequence(
            request_id=str(row),
            prompt=np.arange(100 * row, 100 * row + length, dtype=np.int32),
            adapter=None,
            sampling=SamplingParams(max_tokens=9),
            seed=0,
            priority=0,
            order=row,
            is_streamed=False,
        )
        pages = [10 * row + i for i in range(-(-length // PAGE) + 1)]  # one more than is in use
        assert rows.acquire(sequence, 0, pages) == row
    rows.num_computed[:3] = (5, 8, 9)
    rows.is_decoding[:3] = True
    rows.is_pending[2] = True
    return rows


def mixed_contents() -> StepContents:
    plan = StepPlan(np.array([2, 0, 1]), [Chunk(3, 0, 5, is_last=False)])
    return step_contents(plan, np.array([2, 0, 1]), filled_rows(), (1, 2, 4, 6), SPARE_PAGE)


def test_decode_rows_come_first_padded_with_rows_of_the_spare_page() -> None:
    contents = mixed_contents()
    assert (contents.num_decode_rows, contents.num_real_rows) == (4, 3)
    assert contents.token_ids.tolist() == [NO_TOKEN, 5, 108, 0, 300, 301, 302, 303, 304]
    assert contents.token_rows.tolist() == [2, 0, 1, 6]
    assert contents.sequence_rows.tolist() == [2, 0, 1, 6, 3]
    assert contents.num_new.tolist() == [1, 1, 1, 1, 5]
    assert contents.kv_len.tolist() == [10, 6, 9, 1, 5]
    assert contents.kv_indices.tolist() == [20, 21, 22, 0, 1, 10, 11, 12, SPARE_PAGE, 30, 31]
    assert contents.logit_rows.tolist() == [0, 1, 2]


def test_a_prompt_that_ends_draws_after_its_last_token() -> None:
    rows = filled_rows()
    rows.num_computed[3] = 5
    plan = StepPlan(np.zeros(0, np.int64), [Chunk(3, 5, 2, is_last=True)])
    contents = step_contents(plan, plan.sampled_rows(), rows, (1, 2, 4, 6), SPARE_PAGE)
    assert contents.num_decode_rows == 0
    assert contents.token_ids.tolist() == [305, 306]
    assert contents.kv_len.tolist() == [7]
    assert (contents.logit_rows.tolist(), contents.sampled_rows.tolist()) == ([1], [3])


LAYOUT = BlockLayout(max_tokens=20, max_rows=6, max_sequences=12, max_pages=40)


def test_the_block_says_where_each_token_and_each_page_is() -> None:
    block = np.full(LAYOUT.num_ints, -7, np.int32)
    num_ints = LAYOUT.write(mixed_contents(), block, PAGE)
    fields = LAYOUT.cut(torch.from_numpy(block[:num_ints].copy()))
    assert fields.positions[:9].tolist() == [9, 5, 8, 0, 0, 1, 2, 3, 4]
    assert fields.sequences[:9].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert fields.kv_indptr[:6].tolist() == [0, 3, 5, 8, 9, 11]
    assert fields.last_page_len[:5].tolist() == [2, 2, 1, 1, 1]
    assert fields.qo_indptr[:2].tolist() == [0, 5]
    assert fields.kv_len[4:5].tolist() == [5]
    assert fields.kv_indices.tolist() == mixed_contents().kv_indices.tolist(), "the copy ends with the pages in use"


def test_fields_do_not_overlap_and_start_at_16_bytes() -> None:
    fields = LAYOUT.cut(np.arange(LAYOUT.num_ints, dtype=np.int32))
    arrays = [getattr(fields, name) for name in fields.__slots__]
    numbers = np.concatenate(arrays)
    assert len(np.unique(numbers)) == len(numbers)
    assert all(array[0] % 4 == 0 for array in arrays)
    assert [len(array) for array in arrays] == [20, 20, 20, 6, 6, 6, 13, 12, 13, 12, 40]


def test_a_step_of_padding_touches_the_spare_page_alone() -> None:
    for num_rows, chunk_len in ((4, 0), (0, 2), (2, 2)):
        contents = empty_contents(num_rows, chunk_len, spare_row=6, spare_page=SPARE_PAGE)
        assert set(contents.kv_indices.tolist()) == {SPARE_PAGE}
        assert contents.num_tokens == num_rows + chunk_len
        assert LAYOUT.write(contents, np.zeros(LAYOUT.num_ints, np.int32), PAGE) <= LAYOUT.num_ints


def test_passes_hold_every_token_once_as_a_decode_row_of_its_own() -> None:
    rows = filled_rows()
    plan = StepPlan(np.array([2, 0, 1]), [Chunk(3, 0, 7, is_last=True)])
    passes = list(token_passes(plan, rows, 4, SPARE_PAGE))
    assert [p.num_real_rows for p in passes] == [4, 4, 2]
    assert all(p.num_decode_rows == p.num_tokens == p.num_sequences == 4 for p in passes)
    assert [p.token_ids.tolist() for p in passes] == [
        [NO_TOKEN, 5, 108, 300],
        [301, 302, 303, 304],
        [305, 306, 0, 0],
    ]
    assert [p.kv_len.tolist() for p in passes] == [[10, 6, 9, 1], [2, 3, 4, 5], [6, 7, 1, 1]]
    assert passes[1].kv_indices.tolist() == [30, 30, 30, 30, 31]
    assert passes[2].kv_indices.tolist() == [30, 31, 30, 31, SPARE_PAGE, SPARE_PAGE]
    assert [p.token_rows.tolist() for p in passes] == [[2, 0, 1, 6], [6, 6, 6, 6], [6, 3, 6, 6]]
    assert [p.sequence_rows.tolist() for p in passes] == [[2, 0, 1, 3], [3, 3, 3, 3], [3, 3, 6, 6]]
    assert [p.logit_rows.tolist() for p in passes] == [[0, 1, 2], [], [1]]
    assert np.concatenate([p.sampled_rows for p in passes]).tolist() == plan.sampled_rows().tolist()
