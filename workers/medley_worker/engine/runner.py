"""One step on the model on CPU: from rows and a plan to a forward batch, and from logits to tokens.

It decides nothing: what runs is the plan's. On CUDA, cuda_forward.py does the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medley_worker.engine.adapters import AdapterCache
from medley_worker.engine.forward import DoneTicket
from medley_worker.engine.parallel.followers import Followers
from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import Scores, StepResult, Tops
from medley_worker.engine.rows import RowTable
from medley_worker.engine.sampling_rows import sampling_rows
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.score_pass import Targets, score_rows, targets_of, topped_rows
from medley_worker.engine.step_inputs import held_pages
from medley_worker.models import Decoder, KVCache, build_batch
from medley_worker.ops.lora import LoraBatch
from medley_worker.ops.sampling import build_sampling_batch, sample
from medley_worker.ops.scoring import Best, best_tokens


class ModelForward:
    """`forward.Forward` over a Decoder, its KV cache and the resident adapters."""

    depth = 0

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        adapters: AdapterCache,
        rows: RowTable,
        scheduler: Scheduler,
        others: Followers | None = None,
    ) -> None:
        """others: the ranks that share the model, which are told each pass before it is run."""
        self._others = others
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
        if self._others is not None:
            load_ids = [None if key is None else self._adapters.load_id(key) for key in keys]
            pages = held_pages(rows, order, -(-kv_len // rows.page_size))
            self._others.run(num_decode, num_new, kv_len, pages, load_ids)
        lora = self._adapters.lora_batch(keys, num_new.tolist())
        assert lora is None or isinstance(lora, LoraBatch)
        batch = build_batch(
            token_ids=np.concatenate(token_ids),
            qo_indptr=qo_indptr,
            kv_len=kv_len,
            page_table=rows.page_table[order, : int(rows.num_pages[order].max())],
            num_decode_rows=num_decode,
            logit_rows=qo_indptr[1:][is_sampled] - 1,
            page_size=rows.page_size,
            lora=lora,
            device=self._decoder.device,
        )
        x, residual = self._decoder.trunk(batch, self._kv)
        targets = targets_of(plan, rows)
        scores = None if targets is None else self._score(x, residual, targets)
        logits = self._decoder.head(x, residual, batch.logit_rows)  # [R, V] float32
        entries = sampling_rows(rows, sampled, logits.shape[1])
        drawn = sample(logits, build_sampling_batch(entries, logits.shape[1], logits.device))
        is_bad = drawn.is_nan.cpu().numpy()
        drawn_ids, logprobs = drawn.token_ids.cpu().numpy(), drawn.logprobs.cpu().numpy()
        topped, num_top = topped_rows(sampled, rows)
        tops = _tops(best_tokens(logits[torch.from_numpy(topped)], num_top)) if num_top else None
        return DoneTicket(StepResult(drawn_ids, logprobs, is_bad if is_bad.any() else None, tops, scores))

    def _score(self, x: Tensor, residual: Tensor, targets: Targets) -> Scores:
        """x, residual: [T, H], the decoder's trunk."""
        found = score_rows(
            lambda at: self._decoder.head(x, residual, at),
            torch.from_numpy(targets.places),
            torch.from_numpy(targets.token_ids),
            targets.num_top,
            self._decoder.config.vocab_size,
        )
        tops = None if found.best is None else _tops(found.best)
        return Scores(found.logprobs.numpy(), found.is_best.numpy(), found.is_nan.numpy(), tops)


def _tops(best: Best) -> Tops:
    return Tops(best.token_ids.numpy(), best.logprobs.numpy())
