"""Attention over a paged KV cache: one plan a step, then per layer append and attend.

It does not know sequences or schedules: a plan is made of lengths and page numbers.

Work is cut into items of (block of queries, page). A decode row is a block of its own, a prefill chunk is cut
into blocks of 16 queries. An item's product has a fixed shape and a block's items are combined in page order, so
a query's bits depend on its own keys alone: not on neighbours, on chunking, nor on being decode or prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from medley_worker.ops.linear import ROW_QUANTUM, batched_product

PREFILL_BLOCK = 16  # queries
# Reading a prefix of the cache in place beats gathering pages while at most this share of it is read for nothing.
PREFIX_WASTE = 1.25
# A sum over an outer axis adds the columns past the last multiple of 32 (measured, AVX-512) in another order.
SUM_COLUMNS = 64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageWork:
    """The items of one phase. N blocks of Q queries, I items."""

    num_items: int
    item_block: Tensor  # [I] int64
    pages: Tensor | None  # [I] int64; None: item i is page i of the cache
    key_positions: Tensor  # [I, P] int64
    query_positions: Tensor  # [N, Q] int64
    query_rows: Tensor | None  # [N * Q] int64 token rows; None: block i is token row i (decode)
    out_rows: Tensor | None  # [tokens] int64 into N * Q; None: as query_rows
    block_items: Tensor  # [N * max_pages] int64, each block's items in page order, padded with its last
    is_item: Tensor | None  # [N, max_pages, 1] float32: 0 where padded; None: no padding anywhere
    hidden_by_window: dict[int | None, Tensor] = field(default_factory=dict)

    def hidden(self, window: int | None) -> Tensor:
        """[I, 1, Q, 1, P] bool: True where a query must not see a key. Made once a window, kept for the step."""
        mask = self.hidden_by_window.get(window)
        if mask is None:
            queries = self.query_positions.index_select(0, self.item_block).unsqueeze(-1)  # [I, Q, 1]
            keys = self.key_positions.unsqueeze(1)  # [I, 1, P]
            mask = keys > queries
            if window is not None:
                mask |= keys <= queries - window
            mask = mask.unsqueeze(1).unsqueeze(3)
            self.hidden_by_window[window] = mask
        return mask


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer's append and attend of one step share."""

    num_decode_rows: int
    decode: PageWork | None
    prefill: PageWork | None
    append_pages: Tensor  # [T] int64
    append_offsets: Tensor  # [T] int64
    fresh_pages: Tensor | None  # int64: pages that this step writes from their start


def plan_attention(
    qo_indptr: Ints,
    kv_len: Ints,
    page_table: Ints,
    num_decode_rows: int,
    page_size: int,
    device: torch.device | str = "cpu",
) -> AttentionPlan:
    """The plan of one step. qo_indptr: [B+1], kv_len: [B] with the new tokens, page_table: [B, max_pages]."""
    num_new = np.diff(qo_indptr)
    sequence = np.repeat(np.arange(len(kv_len)), num_new)
    positions = np.arange(qo_indptr[-1]) - np.repeat(qo_indptr[1:] - kv_len, num_new)
    pages, offsets = page_table[sequence, positions // page_size], positions % page_size
    fresh = pages[offsets == 0]
    decode = prefill = None
    if num_decode_rows:
        rows = slice(0, num_decode_rows)
        queries = positions[rows, None]
        decode = _plan_work(queries, page_table[rows], page_size, device, prefix=True)
    if num_decode_rows < len(kv_len):
        prefill = _plan_prefill(qo_indptr, positions, page_table, num_decode_rows, page_size, device)
    return AttentionPlan(
        num_decode_rows=num_decode_rows,
        decode=decode,
        prefill=prefill,
        append_pages=_tensor(pages, device),
        append_offsets=_tensor(offsets, device),
        fresh_pages=_tensor(fresh, device) if len(fresh) else None,
    )


def _tensor(values: Ints, device: torch.device | str) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values), device=device)


def _ramps(counts: Ints) -> Ints:
    """[0..counts[0]-1, 0..counts[1]-1, ...]"""
    ends = np.cumsum(counts)
    return np.asarray(np.arange(ends[-1]) - np.repeat(ends - counts, counts))


def _plan_prefill(
    qo_indptr: Ints,
    positions: Ints,
    page_table: Ints,
    first: int,
    page_size: int,
    device: torch.device | str,
) -> PageWork:
    starts, num_new = qo_indptr[first:-1], np.diff(qo_indptr)[first:]
    num_blocks = -(-num_new // PREFILL_BLOCK)
    block_sequence = np.repeat(np.arange(len(num_new)), num_blocks)
    in_sequence = _ramps(num_blocks)[:, None] * PREFILL_BLOCK + np.arange(PREFILL_BLOCK)  # [N, Q]
    # A block's spare queries repeat its last one.
    rows = starts[block_sequence][:, None] + np.minimum(in_sequence, num_new[block_sequence][:, None] - 1)
    block_starts = (np.cumsum(num_blocks) - num_blocks) * PREFILL_BLOCK
    out_rows = np.repeat(block_starts, num_new) + _ramps(num_new)
    return _plan_work(
        positions[rows],
        page_table[first:][block_sequence],
        page_size,
        device,
        query_rows=_tensor(rows.reshape(-1), device),
        out_rows=_tensor(out_rows, device),
    )


def _plan_work(
    query_positions: Ints,  # [N, Q]
    page_table: Ints,  # [N, max_pages]
    page_size: int,
    device: torch.device | str,
    *,
    prefix: bool = False,
    query_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> PageWork:
    num_blocks = len(query_positions)
    num_pages = query_positions[:, -1] // page_size + 1  # [N]
    block, ordinal = np.repeat(np.arange(num_blocks), num_pages), _ramps(num_pages)
    pages = page_table[block, ordinal]
    item, num_items, is_prefix = np.arange(len(pages)), len(pages), False
    if prefix:
        num_prefix = int(pages.max()) + 1
        # A page that two blocks share has two items, which one page's place cannot hold.
        is_prefix = num_prefix <= PREFIX_WASTE * num_items + 4 and len(np.unique(pages)) == num_items
    if is_prefix:
        item, num_items = pages, num_prefix
    item_block, item_ordinal = np.zeros((2, num_items), dtype=np.int64)
    item_block[item], item_ordinal[item] = block, ordinal
    max_pages = int(num_pages.max())
    columns = np.minimum(np.arange(max_pages), num_pages[:, None] - 1)  # [N, max_pages]
    first_item = np.cumsum(num_pages) - num_pages
    is_item = np.arange(max_pages) < num_pages[:, None]
    return PageWork(
        num_items=num_items,
        item_block=_tensor(item_block, device),
        pages=None if is_prefix else _tensor(pages, device),
        key_positions=_tensor(item_ordinal[:, None] * page_size + np.arange(page_size), device),
        query_positions=_tensor(query_positions, device),
        query_rows=query_rows,
        out_rows=out_rows,
        block_items=_tensor(item[first_item[:, None] + columns].reshape(-1), device),
        is_item=None if is_item.all() else torch.as_tensor(is_item[:, :, None], dtype=torch.float32, device=device),
    )


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> None:
    """Semantics: cache[page(t), :, offset(t)] = (k[t], v[t]) for each new token t.

    k, v: [T, Hkv, D]. k_cache: [num_pages, Hkv, D, P], v_cache: [num_pages, Hkv, P, D]; both are mutated.
    """
    at = (plan.append_pages, plan.append_offsets)
    k_cache.permute(0, 3, 1, 2).index_put_(at, k)
    v_cache.permute(0, 2, 1, 3).index_put_(at, v)


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, window: int | None) -> Tensor:
    """Semantics: y[t] = softmax(q[t] K / sqrt(D)) V over the keys that t sees, softmax in float32.

    q: [T, Hq, D]. Caches as `append_kv` has them, holding the new tokens already. window: how many keys a query
    sees, its own included; None: all up to its own. Returns [T, Hq * D] in q's dtype.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    split = plan.num_decode_rows
    outputs: list[Tensor] = []
    if plan.decode is not None:
        blocks = q[:split].view(split, num_kv_heads, group, head_dim)
        if group == 1:
            blocks = blocks.expand(split, num_kv_heads, ROW_QUANTUM, head_dim)
        elif group % ROW_QUANTUM:
            blocks = F.pad(blocks, (0, 0, 0, -group % ROW_QUANTUM))
        y = _attend(blocks, k_cache, v_cache, plan.decode, window)
        outputs.append(y[:, :, :group].reshape(split, num_heads * head_dim))
    if plan.prefill is not None:
        assert plan.prefill.query_rows is not None
        assert plan.prefill.out_rows is not None
        taken = q.index_select(0, plan.prefill.query_rows)
        blocks = taken.view(-1, PREFILL_BLOCK, num_kv_heads, group, head_dim).transpose(1, 2)
        blocks = blocks.reshape(-1, num_kv_heads, PREFILL_BLOCK * group, head_dim)
        y = _attend(blocks, k_cache, v_cache, plan.prefill, window)
        y = y.view(-1, num_kv_heads, PREFILL_BLOCK, group, head_dim).transpose(1, 2)
        outputs.append(y.reshape(-1, num_heads * head_dim).index_select(0, plan.prefill.out_rows))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    assert len(y) == num_tokens
    return y.to(q.dtype)


def _attend(blocks: Tensor, k_cache: Tensor, v_cache: Tensor, work: PageWork, window: int | None) -> Tensor:
    """Attention of query blocks over their pages. blocks: [N, Hkv, M, D]. Returns [N, Hkv, M, D] float32."""
    num_blocks, num_kv_heads, num_rows, head_dim = blocks.shape
    items, max_pages = work.num_items, len(work.block_items) // num_blocks
    if work.pages is None:
        keys, values = k_cache[:items], v_cache[:items]
    else:
        keys, values = k_cache.index_select(0, work.pages), v_cache.index_select(0, work.pages)
    keys, values = keys.flatten(0, 1).to(torch.float32), values.flatten(0, 1).to(torch.float32)
    scaled = blocks.to(torch.float32) * (1 / math.sqrt(head_dim))
    queries = scaled.index_select(0, work.item_block).flatten(0, 1)  # [I * Hkv, M, D]
    scores = batched_product(queries, keys)  # [I * Hkv, M, P]
    hidden = work.hidden(window)
    # Filled, not added to: what a masked place holds may be anything.
    scores.view(items, num_kv_heads, hidden.shape[2], -1, scores.shape[-1]).masked_fill_(hidden, -math.inf)

    # One softmax over all pages of a block: the largest score first, then sums page by page.
    tops = scores.amax(-1).view(items, -1).index_select(0, work.block_items)
    top = tops.view(num_blocks, max_pages, -1).amax(1)  # [N, Hkv * M]
    scores.sub_(top.index_select(0, work.item_block).view(-1, num_rows, 1)).exp_()
    # Both sums lie side by side, so that one pass over the pages adds them: [M * D | M | unused] a head.
    num_outputs = num_rows * head_dim
    width = -(-(num_outputs + num_rows) // SUM_COLUMNS) * SUM_COLUMNS
    parts = scores.new_empty((items * num_kv_heads, width))
    parts[:, :num_outputs].copy_(batched_product(scores, values).view(-1, num_outputs))
    torch.sum(scores, -1, out=parts[:, num_outputs : num_outputs + num_rows])
    # Page by page. A page that pads a short block is a copy of its last, times 0: that changes no bits.
    taken = parts.view(items, -1).index_select(0, work.block_items).view(num_blocks, max_pages, -1)
    if work.is_item is not None:
        taken.mul_(work.is_item)
    total = taken.sum(1).view(num_blocks, num_kv_heads, width)
    mass = total[:, :, num_outputs : num_outputs + num_rows].unsqueeze(-1)
    return total[:, :, :num_outputs].view(num_blocks, num_kv_heads, num_rows, head_dim) / mass
