"""LoRA for rows of many adapters in one step (SGMV), on CPU as products batched by rank.

Semantics of the whole: y[s[i]:s[i+1]] += scale[i] * (x[s[i]:s[i+1]] @ A_i) @ B_i over the segments i of the step.

A step's rows are cut into blocks of M rows of one adapter. Blocks whose adapters have the same number of tiles
(rounded up to a power of two) are one batched product, so the number of calls depends on the ranks there are and
never on the number of adapters. M is chosen by the step; it changes no bits (see `linear`), and so a row's result
is the same alone and among any neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley_worker.ops.linear import batched_product
from medley_worker.ops.lora_stage import AdapterTiles, LoraStage

BLOCK_ROWS = (4, 8, 16, 32, 64)  # what M may be; `linear` says why multiples of 4
# One block costs about as much as this many of its rows (measured at H 128, rank 16: 0.7 us and 0.12 us, and
# now and then its weights are copied).
BLOCK_COST_ROWS = 12

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RankPart:
    """The blocks of one rank class in one group: blocks [begin, end) of the group's."""

    begin: int
    end: int
    a: tuple[Tensor, ...]  # per layer [blocks, in, sites * R] float32
    b: tuple[tuple[Tensor, ...], ...]  # per site, per layer [blocks, R, out] float32, scale folded in


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """How one projection group's rows lie in blocks."""

    rows: Tensor  # [blocks * M] int64: the token row of each block row
    inverse: Tensor  # [T] int64: the block row of each token row; rows without an adapter point one past the last
    has_base_rows: bool
    block_rows: int
    num_blocks: int
    out_features: tuple[int, ...]
    parts: tuple[RankPart, ...]


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """One step's adapters. Valid until the next `build_lora_batch` on the same stage, which may move weights."""

    groups: Mapping[str, GroupPlan]
    num_adapters: int


def build_lora_batch(
    adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int], stage: LoraStage
) -> LoraBatch | None:
    """The LoraBatch of a step, or None where no row has an adapter.

    adapters: one entry a sequence, in batch order (None: the base); num_tokens: its new tokens. Weights that are
    not staged yet are copied from their tiles.
    """
    distinct: dict[int, AdapterTiles] = {a.load_id: a for a in adapters if a is not None}
    if not distinct:
        return None
    place = {load_id: i for i, load_id in enumerate(distinct)}
    base = len(place)
    owner = np.array([base if a is None else place[a.load_id] for a in adapters], dtype=np.int64)
    owner_of_row = np.repeat(owner, np.asarray(num_tokens, dtype=np.int64))  # [T]
    blocks = _cut_blocks(owner_of_row, base)
    groups: dict[str, GroupPlan] = {}
    for group in stage.layout.groups:
        plan = _plan_group(group.name, list(distinct.values()), blocks, stage)
        if plan is not None:
            groups[group.name] = plan
    return LoraBatch(groups=groups, num_adapters=base)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of all adapters, adapter by adapter, before they are spread over groups and ranks."""

    block_rows: int
    rows: Ints  # [blocks, M] token rows; spare places repeat the adapter's last row
    owner: Ints  # [blocks]
    copy: Ints  # [blocks] the how-manieth block of its adapter
    num_tokens: int
    token_row: Ints  # [rows with an adapter] token rows, adapter by adapter
    token_block: Ints  # [rows with an adapter] and where they lie: block,
    token_offset: Ints  # [rows with an adapter] and row of the block


def _cut_blocks(owner_of_row: Ints, num_adapters: int) -> _Blocks:
    counts = np.bincount(owner_of_row, minlength=num_adapters + 1)[:num_adapters]
    m = min(BLOCK_ROWS, key=lambda size: int((-(-counts // size)).sum()) * (BLOCK_COST_ROWS + size))
    token_row = np.argsort(owner_of_row, kind="stable")[: counts.sum()]
    num_blocks = -(-counts // m)
    first_row, first_block = np.cumsum(counts) - counts, np.cumsum(num_blocks) - num_blocks
    owner = np.repeat(np.arange(num_adapters), num_blocks)
    copy = np.arange(len(owner)) - first_block[owner]
    inside = copy[:, None] * m + np.arange(m)  # [blocks, M] the row's place within its adapter
    rows = token_row[first_row[owner][:, None] + np.minimum(inside, counts[owner][:, None] - 1)]
    row_owner = np.repeat(np.arange(num_adapters), counts)
    row_place = np.arange(len(token_row)) - first_row[row_owner]
    return _Blocks(
        block_rows=m,
        rows=rows,
        owner=owner,
        copy=copy,
        num_tokens=len(owner_of_row),
        token_row=token_row,
        token_block=first_block[row_owner] + row_place // m,
        token_offset=row_place % m,
    )


def _plan_group(group: str, adapters: list[AdapterTiles], blocks: _Blocks, stage: LoraStage) -> GroupPlan | None:
    classes = np.array([stage.rank_class(adapter, group) for adapter in adapters])  # [adapters] tiles, 0: none
    block_class = classes[blocks.owner]
    position = np.zeros(len(blocks.owner), dtype=np.int64)
    parts: list[RankPart] = []
    end = 0
    for num_tiles in sorted({int(c) for c in classes if c}):
        members = np.flatnonzero(block_class == num_tiles)
        wanted = [(adapters[blocks.owner[b]], int(blocks.copy[b])) for b in members]
        stack, slots = stage.place(group, num_tiles, wanted)
        begin, end = end, end + stack.num_slots
        position[members] = begin + np.asarray(slots)
        parts.append(RankPart(begin, end, stack.a_layers, stack.b_layers))
    if not parts:
        return None
    m = blocks.block_rows
    has_adapter = block_class > 0
    rows = np.zeros((end, m), dtype=np.int64)
    rows[position[has_adapter]] = blocks.rows[has_adapter]
    inverse = np.full(blocks.num_tokens, end * m)
    mine = has_adapter[blocks.token_block]
    inverse[blocks.token_row[mine]] = position[blocks.token_block[mine]] * m + blocks.token_offset[mine]
    device = stage.device
    return GroupPlan(
        rows=torch.as_tensor(rows.reshape(-1), device=device),
        inverse=torch.as_tensor(inverse, device=device),
        has_base_rows=int(mine.sum()) < blocks.num_tokens,
        block_rows=m,
        num_blocks=end,
        out_features=stage.layout.group(group).out_features,
        parts=tuple(parts),
    )


def lora_apply(y: Tensor, x: Tensor, group: str, layer: int, batch: LoraBatch | None) -> None:
    """Semantics: y[t] += scale * (x[t] @ A) @ B with the adapter of row t, for all sites of a group at once.

    y: [T, sum of the group's out_features] (q, k, v side by side), mutated. x: [T, in]. fp32 between shrink and
    expand. Rows without an adapter keep their values.
    """
    plan = None if batch is None else batch.groups.get(group)
    if plan is None:
        return
    m = plan.block_rows
    taken = x.index_select(0, plan.rows).to(torch.float32).view(plan.num_blocks, m, -1)
    shrunk = [batched_product(taken[part.begin : part.end], part.a[layer]) for part in plan.parts]
    num_rows, num_sites, column = plan.num_blocks * m, len(plan.out_features), 0
    for site, width in enumerate(plan.out_features):
        # One tensor a site: a product that writes into a slice of columns would loop over its blocks.
        delta = torch.empty((num_rows + 1, width), dtype=torch.float32, device=x.device)
        if plan.has_base_rows:
            delta[num_rows].zero_()
        by_block = delta[:num_rows].view(plan.num_blocks, m, width)
        for part, low in zip(plan.parts, shrunk, strict=True):  # low: [blocks, M, sites * R]
            rank = low.shape[-1] // num_sites
            low_of_site = low[:, :, site * rank : (site + 1) * rank]
            batched_product(low_of_site, part.b[site][layer], out=by_block[part.begin : part.end])
        y[:, column : column + width].add_(delta.index_select(0, plan.inverse))
        column += width
