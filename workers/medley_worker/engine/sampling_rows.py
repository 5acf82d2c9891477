"""From rows to what their draws depend on. Knows rows; no tensors."""

from __future__ import annotations

from medley_worker.engine.rows import NO_TOKEN, Rows, RowTable
from medley_worker.ops.sampling import SamplingRow


def sampling_rows(rows: RowTable, sampled: Rows, vocab_size: int) -> list[SamplingRow | None]:
    """One entry for each of `sampled` ([R]); None: plain greedy."""
    plain = rows.is_plain[sampled].tolist()
    return [
        None if is_plain else _sampling_row(rows, row, vocab_size)
        for row, is_plain in zip(sampled.tolist(), plain, strict=True)
    ]


def _sampling_row(rows: RowTable, row: int, vocab_size: int) -> SamplingRow:
    sequence = rows.sequences[row]
    assert sequence is not None
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
    )
