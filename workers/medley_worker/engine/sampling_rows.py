"""From rows to what their draws depend on. Knows rows; no tensors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medley_worker.engine.matchers import fill_masks
from medley_worker.engine.plans import Rows
from medley_worker.engine.rows import NO_TOKEN, RowTable
from medley_worker.engine.sequences import Sequence
from medley_worker.ops.sampling import SamplingRow


def sampling_rows(rows: RowTable, sampled: Rows, vocab_size: int) -> list[SamplingRow | None]:
    """One entry for each of `sampled` ([R]); None: plain greedy."""
    plain = rows.is_plain[sampled].tolist()
    masks = _masks(rows, sampled[rows.is_guided[sampled]].tolist(), vocab_size)
    return [
        None if is_plain else _sampling_row(rows, row, vocab_size, masks.get(row))
        for row, is_plain in zip(sampled.tolist(), plain, strict=True)
    ]


def _masks(rows: RowTable, guided: list[int], vocab_size: int) -> dict[int, npt.NDArray[np.int32]]:
    """{row: what its grammar allows next}. All their tokens are known."""
    if not guided:
        return {}
    assert not rows.is_pending[guided].any(), "a grammar is asked before its newest token is read"
    matchers = [matcher for row in guided if (matcher := _sequence(rows, row).matcher) is not None]
    return dict(zip(guided, fill_masks(matchers, vocab_size), strict=True))


def _sequence(rows: RowTable, row: int) -> Sequence:
    sequence = rows.sequences[row]
    assert sequence is not None
    return sequence


def _sampling_row(rows: RowTable, row: int, vocab_size: int, allowed: npt.NDArray[np.int32] | None) -> SamplingRow:
    sequence = _sequence(rows, row)
    prompt_len, num_tokens = int(rows.prompt_len[row]), int(rows.num_tokens[row])
    masked: list[int] = []
    if num_tokens < rows.min_len[row]:
        stop_ids = rows.stop_ids[row]
        masked = stop_ids[(stop_ids != NO_TOKEN) & (stop_ids < vocab_size)].tolist()
    return SamplingRow(
        params=sequence.sampling,
        seed=sequence.seed,
        position=num_tokens,
        # Views, not copies: only penalties look at them.
        prompt_token_ids=rows.token_ids[row, :prompt_len],  # type: ignore[arg-type]
        output_token_ids=rows.token_ids[row, prompt_len:num_tokens],  # type: ignore[arg-type]
        masked_token_ids=masked,
        allowed=allowed,
    )
