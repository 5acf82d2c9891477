"""One step on the model: from rows and a plan to a forward batch, and from logits to tokens.

The only request-side file that touches tensors. It decides nothing: what runs is the plan's.
"""

from __future__ import annotations

import numpy as np

from medley_worker.engine.adapters import AdapterCache
from medley_worker.engine.forward import DoneTicket, StepResult
from medley_worker.engine.rows import NO_TOKEN, Rows, RowTable
from medley_worker.engine.scheduler import Scheduler, StepPlan
from medley_worker.models import Decoder, KVCache, build_batch
from medley_worker.ops.sampling import SamplingRow, build_sampling_batch, sample


class ModelForward:
    """`forward.Forward` over a Decoder, its KV cache and the resident adapters."""

    depth = 0

    def __init__(
        self, decoder: Decoder, kv: KVCache, adapters: AdapterCache, rows: RowTable, scheduler: Scheduler
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._adapters = adapters
        self._rows = rows
        self._scheduler = scheduler

    def launch(self, plan: StepPlan, sampled: Rows) -> DoneTicket:
        rows = self._rows
        num_decode = len(plan.decode_rows)
        order = np.concatenate([plan.decode_rows, np.array([c.row for c in plan.chunks], np.int64)])  # [B]
        num_new = np.ones(len(order), np.int64)
        num_new[num_decode:] = [c.num_tokens for c in plan.chunks]
        kv_len = rows.num_computed[order] + num_new
        qo_indptr = np.concatenate([[0], np.cumsum(num_new)])
        is_sampled = np.ones(len(order), np.bool_)
        is_sampled[num_decode:] = [c.is_last for c in plan.chunks]
        token_ids = [rows.token_ids[plan.decode_rows, kv_len[:num_decode] - 1]]
        token_ids += [rows.token_ids[c.row, c.start : c.start + c.num_tokens] for c in plan.chunks]
        keys = [self._scheduler.adapter_of(index) for index in rows.adapter_index[order].tolist()]
        batch = build_batch(
            token_ids=np.concatenate(token_ids),
            qo_indptr=qo_indptr,
            kv_len=kv_len,
            page_table=rows.page_table[order, : int(rows.num_pages[order].max())],
            num_decode_rows=num_decode,
            logit_rows=qo_indptr[1:][is_sampled] - 1,
            page_size=rows.page_size,
            lora=self._adapters.lora_batch(keys, num_new.tolist()),
            device=self._decoder.device,
        )
        logits = self._decoder.forward(batch, self._kv)  # [R, V] float32
        entries = [None if plain else self._sampling_row(row) for row, plain in _with_plain(rows, sampled)]
        drawn = sample(logits, build_sampling_batch(entries, logits.shape[1], logits.device))
        is_bad = drawn.is_nan.cpu().numpy()
        drawn_ids, logprobs = drawn.token_ids.cpu().numpy(), drawn.logprobs.cpu().numpy()
        return DoneTicket(StepResult(drawn_ids, logprobs, is_bad if is_bad.any() else None))

    def _sampling_row(self, row: int) -> SamplingRow:
        rows = self._rows
        sequence = rows.sequences[row]
        assert sequence is not None
        prompt_len, num_tokens = int(rows.prompt_len[row]), int(rows.num_tokens[row])
        masked: list[int] = []
        if num_tokens < rows.min_len[row]:
            stop_ids = rows.stop_ids[row]
            masked = stop_ids[(stop_ids != NO_TOKEN) & (stop_ids < self._decoder.config.vocab_size)].tolist()
        return SamplingRow(
            params=sequence.sampling,
            seed=sequence.seed,
            position=num_tokens,
            # Views, not copies: only penalties look at them.
            prompt_token_ids=rows.token_ids[row, :prompt_len],  # type: ignore[arg-type]
            output_token_ids=rows.token_ids[row, prompt_len:num_tokens],  # type: ignore[arg-type]
            masked_token_ids=masked,
        )


def _with_plain(rows: RowTable, sampled: Rows) -> list[tuple[int, bool]]:
    return list(zip(sampled.tolist(), rows.is_plain[sampled].tolist(), strict=True))
