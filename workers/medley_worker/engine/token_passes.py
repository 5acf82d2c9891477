"""A step cut into passes of one shape, in which every token is a decode row: for results that depend on no neighbour.

A chunk's token attends as a decode row does, to all keys up to its own, which the pass has appended before. So
decode rows and chunks, short steps and long ones, first runs and recomputations go through one kernel each at one
size, and a token's bits do not change with its company or with the way it came. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medley_worker.engine.plans import StepPlan
from medley_worker.engine.rows import NO_TOKEN, RowTable
from medley_worker.engine.step_inputs import StepContents, held_pages


def token_passes(plan: StepPlan, rows: RowTable, pass_rows: int, spare_page: int) -> Iterator[StepContents]:
    """The passes of a plan's step, of `pass_rows` tokens each, padded; the rows they sample are in the plan's order."""
    decode = plan.decode_rows
    row_of = np.concatenate([decode, *(np.full(c.num_tokens, c.row, np.int64) for c in plan.chunks)])  # [T]
    position = np.concatenate(
        [rows.num_computed[decode], *(np.arange(c.start, c.start + c.num_tokens) for c in plan.chunks)]
    )
    is_drawn = np.zeros(len(row_of), np.bool_)
    is_drawn[: len(decode)] = True
    ends = len(decode) + np.cumsum([c.num_tokens for c in plan.chunks], dtype=np.int64)
    is_drawn[ends - 1] = [c.is_last for c in plan.chunks]
    token_ids = rows.token_ids[row_of, position]
    token_ids[: len(decode)][rows.is_pending[decode]] = NO_TOKEN
    for start in range(0, len(row_of), pass_rows):
        part = slice(start, start + pass_rows)
        num_real = len(row_of[part])
        padding = np.full(pass_rows - num_real, rows.num_rows, np.int64)
        kv_len = position[part] + 1
        pages = held_pages(rows, row_of[part], -(-kv_len // rows.page_size))
        drawn = np.flatnonzero(is_drawn[part])
        yield StepContents(
            num_decode_rows=pass_rows,
            num_real_rows=num_real,
            token_ids=np.concatenate([token_ids[part], np.zeros(len(padding), np.int32)]),
            sequence_rows=np.concatenate([row_of[part], padding]),
            token_rows=np.concatenate([np.where(is_drawn[part], row_of[part], rows.num_rows), padding]),
            num_new=np.ones(pass_rows, np.int64),
            kv_len=np.concatenate([kv_len, np.ones(len(padding), np.int64)]),
            kv_indices=np.concatenate([pages, np.full(len(padding), spare_page, np.int32)]),
            logit_rows=drawn,
            sampled_rows=row_of[part][drawn],
        )
