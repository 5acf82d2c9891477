"""`forward.Forward` on CUDA, one step ahead of the host: inputs up in one copy, results down in one.

Owns the memory that steps write at fixed places, on the device and pinned; passes (cuda_passes.py) read theirs. Steps
of decode rows alone draw within their graph; where prompt chunks run too, what is drawn is launched after them. It
decides nothing: what runs is the plan's. The other ranks of the model are told each pass before it is launched.

| memory | written by | read by |
| last_token | each draw | the next step, for rows whose newest token the host has not read |
| an output's results | the step's last copy | the host, after the output's event |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from medley_worker.engine.adapters import AdapterCache
from medley_worker.engine.cuda_passes import NUM_BUFFERS, CudaPasses
from medley_worker.engine.cuda_scores import Asked
from medley_worker.engine.parallel.followers import Followers
from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import StepResult
from medley_worker.engine.rows import RowTable
from medley_worker.engine.sampling_rows import sampling_rows
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.step_inputs import StepContents, step_contents
from medley_worker.engine.token_passes import token_passes
from medley_worker.models import Decoder, KVCache
from medley_worker.ops.greedy import greedy
from medley_worker.ops.memory import Memory, PlainMemory
from medley_worker.ops.sampling import SamplingRow, build_sampling_batch, sample
from medley_worker.ops.sgmv import SgmvBatch

RESULT_BYTES = 8 + 4 + 1  # a token id, its logprob, whether the row is bad


@dataclass(frozen=True, slots=True)
class Results:
    """A block of bytes cut into one step's results, each [R]."""

    token_ids: Tensor  # int64
    logprobs: Tensor  # float32
    is_bad: Tensor  # uint8

    @staticmethod
    def cut(block: Tensor, num_rows: int) -> Results:
        """block: uint8, RESULT_BYTES a row or more."""
        ids, logprobs, end = 8 * num_rows, 12 * num_rows, RESULT_BYTES * num_rows
        return Results(block[:ids].view(torch.int64), block[ids:logprobs].view(torch.float32), block[logprobs:end])


class _Output:
    """What the host reads of one step."""

    def __init__(self, num_rows: int) -> None:
        self.results = torch.zeros(RESULT_BYTES * num_rows, dtype=torch.uint8).pin_memory()
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class CudaTicket:
    """A step on its way. num_rows: rows computed, of which the first num_sampled were asked for."""

    output: _Output
    num_rows: int
    num_sampled: int
    asked: Asked

    def result(self) -> StepResult:
        self.output.done.synchronize()
        found, wanted = Results.cut(self.output.results, self.num_rows), slice(self.num_sampled)
        is_bad = found.is_bad[wanted].numpy().astype(np.bool_)
        return StepResult(
            found.token_ids[wanted].numpy().copy(),
            found.logprobs[wanted].numpy().copy(),
            is_bad if is_bad.any() else None,
            self.asked.tops(),
            self.asked.scores(),
        )


class CudaForward(CudaPasses):
    """One model, its cache and its resident adapters on one CUDA device.

    max_tokens: the scheduler's token budget of a step. is_invariant: every step runs as passes of one shape
    (token_passes.py), so that a row's bits do not depend on its neighbours; slower. Building it builds kernels and
    captures graphs: seconds, minutes where FlashInfer's kernels are not built yet.
    """

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        adapters: AdapterCache,
        rows: RowTable,
        scheduler: Scheduler,
        *,
        max_tokens: int,
        is_invariant: bool = False,
        others: Followers | None = None,
        memory: Memory | None = None,
    ) -> None:
        """others: the ranks that have the rest of the model. memory: where logits and workspaces lie on the device;
        None: torch's own.
        """
        memory = PlainMemory(decoder.device) if memory is None else memory
        super().__init__(
            decoder,
            kv,
            adapters,
            memory,
            num_rows=rows.num_rows,
            max_row_pages=rows.page_table.shape[1],
            max_tokens=max_tokens,
            is_invariant=is_invariant,
        )
        self._adapters, self._rows, self._scheduler, self._others = adapters, rows, scheduler, others
        num_rows, device = rows.num_rows, decoder.device
        self._results = torch.zeros(RESULT_BYTES * num_rows, dtype=torch.uint8, device=device)
        self._logits = memory.cleared((num_rows, decoder.config.vocab_size), torch.float32)
        self._outputs = cycle([_Output(num_rows) for _ in range(NUM_BUFFERS)])
        with torch.inference_mode(), torch.cuda.device(device):
            self._warm_up()

    def launch(self, plan: StepPlan, sampled: Rows) -> CudaTicket:
        with torch.inference_mode(), torch.cuda.device(self._decoder.device):
            asked = Asked(plan, sampled, self._rows, self._decoder.device)
            if self._is_invariant:
                return self._launch_passes(plan, len(sampled), asked)
            contents = step_contents(plan, sampled, self._rows, self._buckets, self._kv.spare_page)
            lora = self._lora(contents)
            self._send(contents)
            if plan.chunks:
                return self._launch_mixed(contents, lora, asked)
            return self._launch_decode(contents, lora, asked)

    def _launch_mixed(self, contents: StepContents, lora: SgmvBatch | None, asked: Asked) -> CudaTicket:
        num_rows = len(contents.sampled_rows)
        x, residual = self._mixed(contents, lora)
        asked.score_trunk(self._decoder, x, residual, num_padded=contents.num_decode_rows - contents.num_real_rows)
        logits = self._decoder.head(x, residual, self._fields.logit_rows[:num_rows])
        results, rows = Results.cut(self._results, num_rows), self._fields.sampled_rows[:num_rows].to(torch.int64)
        if self._rows.is_plain[contents.sampled_rows].all():
            greedy(logits, results.token_ids, results.logprobs, results.is_bad, rows, self._last_token)
        else:
            entries = sampling_rows(self._rows, contents.sampled_rows, logits.shape[1])
            self._draw(logits, entries, rows, results)
        asked.find_tops(logits)
        return self._ticket(self._results, num_rows, num_rows, asked)

    def _launch_decode(self, contents: StepContents, lora: SgmvBatch | None, asked: Asked) -> CudaTicket:
        bucket, sampled = contents.num_decode_rows, contents.sampled_rows
        self._decode(contents, lora)
        if not self._rows.is_plain[sampled].all():
            logits, rows = self._logits[: len(sampled)], self._fields.token_rows[: len(sampled)].to(torch.int64)
            entries = sampling_rows(self._rows, sampled, logits.shape[1])
            self._draw(logits, entries, rows, Results.cut(self._results, bucket))
        asked.find_tops(self._logits)
        return self._ticket(self._results, bucket, len(sampled), asked)

    def _launch_passes(self, plan: StepPlan, num_sampled: int, asked: Asked) -> CudaTicket:
        """A step as passes of one shape; each brings the results of its rows to the step's."""
        bucket, num_done = self._buckets[0], 0
        whole = torch.empty_like(self._results)
        into, found = Results.cut(whole, num_sampled), Results.cut(self._results, bucket)
        for i, contents in enumerate(token_passes(plan, self._rows, bucket, self._kv.spare_page)):
            lora = self._lora(contents, begins_step=i == 0)
            self._send(contents)
            self._decode(contents, lora)
            if not self._rows.is_plain[contents.sampled_rows].all():
                # All rows of the pass are drawn again: other shapes would give other bits.
                entries: list[SamplingRow | None] = [None] * bucket
                drawn = sampling_rows(self._rows, contents.sampled_rows, self._logits.shape[1])
                for at, entry in zip(contents.logit_rows.tolist(), drawn, strict=True):
                    entries[at] = entry
                self._draw(self._logits, entries, self._fields.token_rows[:bucket].to(torch.int64), found)
            asked.take_pass(i * bucket, self._logits, num_done, contents.logit_rows)
            end = num_done + len(contents.logit_rows)
            at_rows = self._fields.logit_rows[: end - num_done]
            into.token_ids[num_done:end].copy_(found.token_ids.index_select(0, at_rows))
            into.logprobs[num_done:end].copy_(found.logprobs.index_select(0, at_rows))
            into.is_bad[num_done:end].copy_(found.is_bad.index_select(0, at_rows))
            num_done = end
        return self._ticket(whole, num_sampled, num_sampled, asked)

    def _ticket(self, results: Tensor, num_rows: int, num_sampled: int, asked: Asked) -> CudaTicket:
        """Bring a step's results to the host, after all that is launched so far."""
        output, end = next(self._outputs), RESULT_BYTES * num_rows
        output.results[:end].copy_(results[:end], non_blocking=True)
        asked.bring()
        output.done.record()
        return CudaTicket(output, num_rows, num_sampled, asked)

    def _lora(self, contents: StepContents, begins_step: bool = True) -> SgmvBatch | None:
        """The adapters of a pass, of which the other ranks are told here, before anything of it is launched."""
        indices = np.append(self._rows.adapter_index, 0)[contents.sequence_rows]  # the spare row has no adapter
        keys = [self._scheduler.adapter_of(index) for index in indices.tolist()]
        if self._others is not None:
            load_ids = [None if key is None else self._adapters.load_id(key) for key in keys]
            arrays = (contents.num_new, contents.kv_len, contents.kv_indices)
            self._others.run(contents.num_decode_rows, *arrays, load_ids, begins_step=begins_step)
        batch = self._adapters.lora_batch(keys, contents.num_new.tolist(), begins_step=begins_step)
        assert batch is None or isinstance(batch, SgmvBatch)
        return batch

    def _compute_decode(self, contents: StepContents, lora: SgmvBatch | None) -> None:
        bucket = contents.num_decode_rows
        logits = self._decoder.forward(self._batch(contents, lora, None), self._kv, self._logits[:bucket])
        results, rows = Results.cut(self._results, bucket), self._fields.token_rows[:bucket].to(torch.int64)
        greedy(logits, results.token_ids, results.logprobs, results.is_bad, rows, self._last_token)

    def _draw(self, logits: Tensor, entries: list[SamplingRow | None], rows: Tensor, results: Results) -> None:
        """Draw with each row's sampling parameters. logits: [R, V], rows: [R] int64, results: [R or more]."""
        num_rows = len(entries)
        drawn = sample(logits, build_sampling_batch(entries, logits.shape[1], logits.device))
        results.token_ids[:num_rows].copy_(drawn.token_ids)
        results.logprobs[:num_rows].copy_(drawn.logprobs)
        results.is_bad[:num_rows].copy_(drawn.is_nan)
        self._last_token.index_copy_(0, rows, drawn.token_ids)
