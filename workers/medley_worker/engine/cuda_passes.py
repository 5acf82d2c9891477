"""One pass through a model's layers on CUDA: inputs up in one copy from fixed places, then graphs.

Passes of decode rows alone replay one graph, those with prompt chunks a run of graphs with attention between them, up
to a number of tokens beyond which launching operator by operator takes the host no longer than the device computes.

Owns the memory that passes read at fixed places, on the device and pinned, and the graphs. Every rank of a model runs
the same passes; what is drawn from them is rank 0's matter (cuda_forward.py).

| memory | written by | read by |
| an input's block and plans | the host, once their last copies are done | the pass's copies |
| the device's block | that copy, in stream order | the pass |
"""

from __future__ import annotations

from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medley_worker.engine.adapter_memory import AdapterMemory, Lora
from medley_worker.engine.decode_graphs import DecodeGraphs
from medley_worker.engine.parallel.messages import PassArrays
from medley_worker.engine.step_inputs import BlockLayout, StepContents, empty_contents, row_buckets, token_buckets
from medley_worker.engine.trunk_graphs import TrunkGraphs
from medley_worker.models import Decoder, ForwardBatch, KVCache
from medley_worker.ops.memory import Memory
from medley_worker.ops.paged import PagedPlan
from medley_worker.ops.paged_attention import PagedAttention, PlanMemory
from medley_worker.ops.sgmv import SMALL_ROWS, SgmvBatch, SgmvLora

NUM_BUFFERS = 2  # one step runs, the next is being launched
WARM_UP_CHUNK = 2  # tokens


class _Input:
    """What the host writes of one pass."""

    def __init__(self, layout: BlockLayout, windows: tuple[int | None, ...]) -> None:
        self.block = torch.zeros(layout.num_ints, dtype=torch.int32).pin_memory()
        self.numbers = self.block.numpy()
        self.fields = layout.cut(self.block)
        self.plans = PlanMemory(windows)
        self.read = torch.cuda.Event()  # type: ignore[no-untyped-call]


class Adapters(Protocol):
    """What a pass asks of adapter memory; AdapterCache and AdapterMemory have it."""

    @property
    def lora(self) -> Lora: ...

    @property
    def num_tiles(self) -> int: ...


class CudaPasses:
    """One rank's passes. A subclass says what is computed of a step of decode rows, which is captured.

    num_rows: of the row table; there is one more, the spare one, whose tokens nobody wants. max_row_pages: pages of one
    row. max_tokens: the scheduler's token budget of a step. is_invariant: every pass has one shape. memory: where
    workspaces lie on the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        adapters: Adapters,
        memory: Memory,
        *,
        num_rows: int,
        max_row_pages: int,
        max_tokens: int,
        is_invariant: bool,
    ) -> None:
        self._decoder, self._kv = decoder, kv
        self._is_invariant = is_invariant
        self._lora_memory = adapters
        self._spare_row = num_rows
        self._buckets = (num_rows,) if is_invariant else row_buckets(num_rows)
        self._layout = BlockLayout(
            max_tokens=num_rows + (0 if is_invariant else max_tokens),
            max_rows=num_rows,
            max_sequences=2 * num_rows,  # padded decode rows, and a chunk for each row
            # Tokens of one chunk name the same pages, each for itself.
            max_pages=num_rows * max_row_pages if is_invariant else kv.num_pages + num_rows,
        )
        device = decoder.device
        self._block = torch.zeros(self._layout.num_ints, dtype=torch.int32, device=device)
        self._fields = self._layout.cut(self._block)
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
        self._graphs = DecodeGraphs(device)
        self._trunk_graphs = TrunkGraphs(decoder, token_buckets(self._layout.max_tokens))

    def close(self) -> None:
        """Let go of the graphs: a group's communicator outlives none that it is captured in."""
        self._graphs.clear()
        self._trunk_graphs.clear()

    def _compute_decode(self, contents: StepContents, lora: SgmvBatch | None) -> None:
        """A step of decode rows alone, as it is captured."""
        raise NotImplementedError

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
        _check_items(lora)
        if self._graphs.has(bucket, has_lora):
            self._graphs.replay(bucket, has_lora)
            return
        self._compute_decode(contents, lora)
        self._graphs.capture(bucket, has_lora, lambda: self._compute_decode(contents, lora))

    def _mixed(self, contents: StepContents, lora: SgmvBatch | None) -> tuple[Tensor, Tensor]:
        """The trunk of a step with prompt chunks: (x, residual), [T, H] each."""
        batch = self._batch(contents, lora, None)
        if not self._trunk_graphs.has(contents.num_tokens, lora is not None):
            return self._decoder.trunk(batch, self._kv)
        _check_items(lora)
        attend = self._decoder.attention(batch, self._kv)
        return self._trunk_graphs.replay(batch.token_ids, lora is not None, attend)

    def _warm_up(self) -> None:
        """Build every kernel and capture the steps of each bucket, the largest first."""
        spare_row, spare_page = self._spare_row, self._kv.spare_page
        lora = self._lora_memory.lora
        capture_lora = lora.capture_batch() if isinstance(lora, SgmvLora) and self._lora_memory.num_tiles else None
        if not self._is_invariant:
            contents = empty_contents(0, WARM_UP_CHUNK, spare_row, spare_page)
            self._send(contents)
            self._decoder.trunk(self._batch(contents, None, None), self._kv)
            for batch in (None,) if capture_lora is None else (None, capture_lora):
                self._trunk_graphs.capture(batch)
        for bucket in reversed(self._buckets):
            contents = empty_contents(bucket, 0, spare_row, spare_page)
            self._send(contents)
            self._decode(contents, None)
            if capture_lora is not None:
                self._decode(contents, capture_lora)
        torch.cuda.synchronize()


def _check_items(lora: SgmvBatch | None) -> None:
    assert lora is None or lora.block_rows == SMALL_ROWS, "graphs are captured with small items"


class CudaFollowerPasses(CudaPasses):
    """The passes of a rank that follows: layers, and nothing before or after them."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        adapters: AdapterMemory,
        memory: Memory,
        *,
        num_rows: int,
        max_row_pages: int,
        max_tokens: int,
        is_invariant: bool,
    ) -> None:
        super().__init__(
            decoder,
            kv,
            adapters,
            memory,
            num_rows=num_rows,
            max_row_pages=max_row_pages,
            max_tokens=max_tokens,
            is_invariant=is_invariant,
        )
        with torch.inference_mode(), torch.cuda.device(decoder.device):
            self._warm_up()

    def run(self, num_decode_rows: int, arrays: PassArrays, lora: object | None) -> None:
        """Launch a pass."""
        assert lora is None or isinstance(lora, SgmvBatch)
        contents = _contents(num_decode_rows, arrays)
        with torch.inference_mode(), torch.cuda.device(self._decoder.device):
            self._send(contents)
            if contents.num_sequences > num_decode_rows:
                self._mixed(contents, lora)
            else:
                self._decode(contents, lora)

    def _compute_decode(self, contents: StepContents, lora: SgmvBatch | None) -> None:
        self._decoder.trunk(self._batch(contents, lora, None), self._kv)


def _contents(num_decode_rows: int, arrays: PassArrays) -> StepContents:
    """A pass without its tokens, which come embedded."""
    no_rows = np.zeros(0, np.int64)
    return StepContents(
        num_decode_rows=num_decode_rows,
        num_real_rows=num_decode_rows,
        token_ids=np.zeros(int(arrays.num_new.sum()), np.int32),
        sequence_rows=np.zeros(len(arrays.num_new), np.int64),
        token_rows=np.zeros(num_decode_rows, np.int64),
        num_new=arrays.num_new,
        kv_len=arrays.kv_len,
        kv_indices=arrays.kv_indices,
        logit_rows=no_rows,
        sampled_rows=no_rows,
    )
