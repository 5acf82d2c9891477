"""`forward.Forward` on CUDA, one step ahead of the host: inputs up in one copy, results down in one.

Owns the memory that steps read and write at fixed places, on the device and pinned. Steps of decode rows alone
replay graphs; steps with prompt chunks run operator by operator. It decides nothing: what runs is the plan's.

| memory | written by | read by |
| an input's block and plans | the host, once their last copies are done | the pass's copies |
| the device's block | that copy, in stream order | the pass |
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
from medley_worker.engine.cuda_scores import Asked
from medley_worker.engine.decode_graphs import DecodeGraphs
from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import StepResult
from medley_worker.engine.rows import RowTable
from medley_worker.engine.sampling_rows import sampling_rows
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.step_inputs import BlockLayout, StepContents, empty_contents, row_buckets, step_contents
from medley_worker.engine.token_passes import token_passes
from medley_worker.models import Decoder, ForwardBatch, KVCache
from medley_worker.ops.greedy import greedy
from medley_worker.ops.memory import Memory, PlainMemory
from medley_worker.ops.paged import PagedPlan
from medley_worker.ops.paged_attention import PagedAttention, PlanMemory
from medley_worker.ops.sampling import SamplingRow, build_sampling_batch, sample
from medley_worker.ops.sgmv import PREFILL_TOKENS, SgmvBatch, SgmvLora

NUM_BUFFERS = 2  # one step runs, the next is being launched
RESULT_BYTES = 8 + 4 + 1  # a token id, its logprob, whether the row is bad
WARM_UP_CHUNK = 2  # tokens


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


class _Input:
    """What the host writes of one pass."""

    def __init__(self, layout: BlockLayout, windows: tuple[int | None, ...]) -> None:
        self.block = torch.zeros(layout.num_ints, dtype=torch.int32).pin_memory()
        self.numbers = self.block.numpy()
        self.fields = layout.cut(self.block)
        self.plans = PlanMemory(windows)
        self.read = torch.cuda.Event()  # type: ignore[no-untyped-call]


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


class CudaForward:
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
        memory: Memory | None = None,
    ) -> None:
        """memory: where logits and workspaces lie on the device; None: torch's own."""
        self._decoder, self._kv, self._adapters = decoder, kv, adapters
        self._rows, self._scheduler = rows, scheduler
        self._is_invariant = is_invariant
        num_rows = rows.num_rows
        self._buckets = (num_rows,) if is_invariant else row_buckets(num_rows)
        self._layout = BlockLayout(
            max_tokens=num_rows + (0 if is_invariant else max_tokens),
            max_rows=num_rows,
            max_sequences=2 * num_rows,  # padded decode rows, and a chunk for each row
            # Tokens of one chunk name the same pages, each for itself.
            max_pages=num_rows * rows.page_table.shape[1] if is_invariant else kv.num_pages + num_rows,
        )
        device = decoder.device
        self._block = torch.zeros(self._layout.num_ints, dtype=torch.int32, device=device)
        self._fields = self._layout.cut(self._block)
        self._results = torch.zeros(RESULT_BYTES * num_rows, dtype=torch.uint8, device=device)
        memory = PlainMemory(device) if memory is None else memory
        self._logits = memory.cleared((num_rows, decoder.config.vocab_size), torch.float32)
        # One more: what padded rows draw goes there.
        self._last_token = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._attention = PagedAttention(
            decoder.config,
            decoder.dtype,
            page_size=kv.page_size,
            buckets=self._buckets,
            kv_indptr=self._fields.kv_indptr,
            kv_indices=self._fields.kv_indices,
            last_page_len=self._fields.last_page_len,
            is_invariant=is_invariant,
            memory=memory,
        )
        self._inputs = cycle([_Input(self._layout, self._attention.windows) for _ in range(NUM_BUFFERS)])
        self._outputs = cycle([_Output(num_rows) for _ in range(NUM_BUFFERS)])
        self._graphs = DecodeGraphs()
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
                return self._launch_eagerly(contents, lora, asked)
            return self._launch_decode(contents, lora, asked)

    def _launch_eagerly(self, contents: StepContents, lora: SgmvBatch | None, asked: Asked) -> CudaTicket:
        num_rows = len(contents.sampled_rows)
        x, residual = self._decoder.trunk(self._batch(contents, lora, None), self._kv)
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

    def _send(self, contents: StepContents) -> None:
        """Bring a pass's inputs to the device and plan its attention."""
        source = next(self._inputs)
        source.read.synchronize()  # two passes ago: done long since, or the host is far enough ahead
        num_ints = self._layout.write(contents, source.numbers, self._kv.page_size)
        self._block[:num_ints].copy_(source.block[:num_ints], non_blocking=True)
        split, end, host = contents.num_decode_rows, contents.num_sequences, source.fields
        if split:
            self._attention.plan_decode(split, host.kv_indptr[: split + 1], host.last_page_len[:split], source.plans)
        if split < end:
            self._attention.plan_prefill(
                host.qo_indptr[: end - split + 1],
                host.kv_indptr[split : end + 1],
                host.last_page_len[split:end],
                host.kv_len[split:end],
                source.plans,
            )
        source.read.record()

    def _lora(self, contents: StepContents, begins_step: bool = True) -> SgmvBatch | None:
        indices = np.append(self._rows.adapter_index, 0)[contents.sequence_rows]  # the spare row has no adapter
        keys = [self._scheduler.adapter_of(index) for index in indices.tolist()]
        batch = self._adapters.lora_batch(keys, contents.num_new.tolist(), begins_step=begins_step)
        assert batch is None or isinstance(batch, SgmvBatch)
        return batch

    def _batch(self, contents: StepContents, lora: SgmvBatch | None, logit_rows: Tensor | None) -> ForwardBatch:
        """What the decoder computes of a step whose inputs are on their way. logit_rows: None takes every token row."""
        fields, attention = self._fields, self._attention
        split, num_tokens, num_sequences = contents.num_decode_rows, contents.num_tokens, contents.num_sequences
        token_ids = fields.token_ids[:num_tokens].to(torch.int64)
        if split:
            newest = self._last_token.index_select(0, fields.token_rows[:split])
            decode_ids = token_ids[:split]
            decode_ids.copy_(torch.where(decode_ids < 0, newest, decode_ids))
        plan = PagedPlan(
            num_decode_rows=split,
            decode=attention.decode_kernels(split) if split else {},
            prefill=attention.prefill_kernels() if split < num_sequences else {},
            positions=fields.positions[:num_tokens],
            sequences=fields.sequences[:num_tokens],
            kv_indptr=fields.kv_indptr[: num_sequences + 1],
            kv_indices=fields.kv_indices,
            last_page_len=fields.last_page_len[:num_sequences],
        )
        return ForwardBatch(
            token_ids=token_ids,
            positions=plan.positions,
            num_decode_rows=split,
            logit_rows=logit_rows,
            attention=plan,
            lora=lora,
        )

    def _decode(self, contents: StepContents, lora: SgmvBatch | None) -> None:
        """A step of decode rows alone, with its greedy draw; the first of its kind is captured for those after it."""
        bucket, has_lora = contents.num_decode_rows, lora is not None
        if self._graphs.has(bucket, has_lora):
            self._graphs.replay(bucket, has_lora)
            return
        self._compute_decode(contents, lora)
        self._graphs.capture(bucket, has_lora, lambda: self._compute_decode(contents, lora))

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

    def _warm_up(self) -> None:
        """Build every kernel and capture the steps of each bucket, the largest first."""
        spare_row, spare_page = self._rows.num_rows, self._kv.spare_page
        if not self._is_invariant:
            contents = empty_contents(0, WARM_UP_CHUNK, spare_row, spare_page)
            self._send(contents)
            self._decoder.forward(self._batch(contents, None, self._fields.logit_rows[:0]), self._kv)
        for bucket in reversed(self._buckets):
            contents = empty_contents(bucket, 0, spare_row, spare_page)
            self._send(contents)
            self._decode(contents, None)
            # Work lists of more rows have other items, which their first step captures.
            if isinstance(self._adapters.lora, SgmvLora) and self._adapters.num_tiles and bucket < PREFILL_TOKENS:
                self._decode(contents, self._adapters.lora.capture_batch())
        torch.cuda.synchronize()
