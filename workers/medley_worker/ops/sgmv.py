"""LoRA for rows of many adapters in one step (SGMV) on CUDA: the work list, and the launch over it.

Semantics: y[s[i]:s[i+1]] += scale[i] * (x[s[i]:s[i+1]] @ A_i) @ B_i over the segments i of the step (Punica, section
4; csrc/README.md has the kernels). The work list lies in fixed device memory and kernels walk it with a fixed grid,
so a captured graph serves any later step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import c_int32
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley_worker.ops.kernels import DTYPES, HEADER, ITEM, MAX_SITES, MAX_TILES, MODES, Call, Group, kernels
from medley_worker.ops.lora_stage import SITES, AdapterTiles, GroupShape
from medley_worker.ops.memory import Memory, PlainMemory
from medley_worker.ops.operators import register
from medley_worker.ops.sgmv_layout import BLOCK, FragmentLayout, fragment_layout
from medley_worker.ops.sgmv_shares import Shares, shares

__all__ = ["SgmvBatch", "SgmvLora", "fragment_layout", "sgmv_apply"]

# Rows of a work item. The larger one reads weights a quarter as often, the smaller one leaves registers for more
# warps; a row's bits are the same in both.
SMALL_ROWS, LARGE_ROWS = BLOCK_ROWS = (8, 32)
# Large items pay where they are nearly full: there must be so many times fewer of them, in a step of so many tokens.
LARGE_SHARE, LARGE_TOKENS = 3, 1024
# Segments past one for each adapter and phase, for callers that do not sort.
SPARE_ITEMS = 512
HEADER_BYTES = HEADER * 4
NUM_STAGES = 3  # work lists on their way to the device: the host is at most two steps ahead

Items = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class SgmvBatch:
    """The adapters of one step, as `sgmv_apply` reads them. Valid until the next `SgmvLora.batch`."""

    lora: SgmvLora
    block_rows: int
    num_adapters: int


class SgmvLora:
    """The work lists of one engine over one pool of tiles.

    pool: [num_tiles (+ any), tile_elements] on a CUDA device, bfloat16 or float16. max_tokens: of one step.
    max_adapters: distinct ones in one step. mode: "bulk", "ring" (csrc/medley.h), or None for the faster that there is.
    memory: where the workspace lies on the device; None: torch's own.
    """

    def __init__(
        self,
        layout: FragmentLayout,
        pool: Tensor,
        max_tokens: int,
        max_adapters: int,
        mode: str | None = None,
        pdl: bool = True,
        memory: Memory | None = None,
    ) -> None:
        if not pool.is_cuda or pool.dtype not in DTYPES or not pool.is_contiguous():
            raise ValueError(f"pool: got {pool.dtype} on {pool.device}, wanted contiguous bfloat16 or float16 on CUDA")
        if pool.dim() != 2 or pool.shape[1] != layout.tile_elements:
            raise ValueError(f"pool: got shape {tuple(pool.shape)}, wanted [tiles, {layout.tile_elements}]")
        self.layout, self.device, self.dtype = layout, pool.device, pool.dtype
        self.handle = next(_handles)  # by which the torch operator knows it
        _known[self.handle] = self
        self._pool = pool
        index = pool.device.index if pool.device.index is not None else torch.cuda.current_device()
        self._kernels = kernels(index)
        is_hopper = torch.cuda.get_device_capability(index)[0] >= 9
        wanted = ("bulk", "ring") if is_hopper else ("ring",)
        mode = wanted[0] if mode is None else mode
        if mode not in wanted:
            raise ValueError(f"mode: got {mode!r}, wanted {' or '.join(wanted)} on this device")
        self._mode = MODES[mode]
        self._pdl = int(pdl and is_hopper)
        self._groups = {group.name: _group(layout, group) for group in layout.groups}
        with torch.cuda.device(index):
            self._room = {
                (name, rows): self._kernels.room(group, rows, self._mode)
                for name, group in self._groups.items()
                for rows in BLOCK_ROWS
            }
        self._max_tokens, self._max_adapters = max_tokens, max_adapters
        self._capacity = {
            rows: min(max_tokens, -(-max_tokens // rows) + 2 * max_adapters + SPARE_ITEMS) for rows in BLOCK_ROWS
        }
        stride = HEADER_BYTES + max(self._capacity.values()) * ITEM.itemsize
        self._offsets = {group.name: i * stride for i, group in enumerate(layout.groups)}
        num_bytes = len(layout.groups) * stride
        # No items, and all else 1: what a graph captured before the first step reads.
        empty = torch.zeros(num_bytes, dtype=torch.uint8)
        for start in self._offsets.values():
            empty[start : start + HEADER_BYTES].view(torch.int32)[1:] = 1
        self._device_lists = empty.to(pool.device)
        self._stages = [torch.zeros(num_bytes, dtype=torch.uint8).pin_memory() for _ in range(NUM_STAGES)]
        self._sent = [torch.cuda.Event() for _ in range(NUM_STAGES)]  # type: ignore[no-untyped-call]
        self._num_sent = 0
        self._workspace = self._new_workspace(PlainMemory(pool.device) if memory is None else memory)
        self._records: dict[int, dict[str, Items]] = {}
        self._calls: dict[tuple[str, int, int], Call] = {}

    def capture_batch(self) -> SgmvBatch:
        """What a graph is captured with: it reads whatever list of small items is in place when it runs."""
        return SgmvBatch(self, SMALL_ROWS, 0)

    def batch(
        self, adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int], block_rows: int | None = None
    ) -> SgmvBatch | None:
        """Send the work list of a step to the device, on the current stream; None where no row has an adapter.

        adapters: one entry a sequence, in batch order (None: the base); num_tokens: its new tokens. Neighbours that
        share an adapter share its weights' way through the chip, so sort by adapter. Raises ValueError.
        """
        if sum(num_tokens) > self._max_tokens:
            raise ValueError(f"num_tokens: got {sum(num_tokens)} in all, wanted at most {self._max_tokens}")
        segments = _segments(adapters, num_tokens)
        if not segments:
            return None
        if block_rows is None:
            block_rows = _block_rows(segments, num_tokens)
        distinct = {adapter.load_id: adapter for adapter, _, _ in segments}
        if len(distinct) > self._max_adapters:
            raise ValueError(f"adapters: got {len(distinct)} distinct ones, wanted at most {self._max_adapters}")
        self._records = {
            load_id: self._records.get(load_id) or self._record(adapter) for load_id, adapter in distinct.items()
        }
        stage, event = self._stages[self._num_sent % NUM_STAGES], self._sent[self._num_sent % NUM_STAGES]
        if self._num_sent >= NUM_STAGES:
            event.synchronize()
        self._num_sent += 1
        for group in self.layout.groups:
            items = self._items(group, segments, block_rows)
            self._send(group.name, items, self._shares(group, items, block_rows), stage)
        event.record()
        return SgmvBatch(self, block_rows, len(distinct))

    def apply(self, y: Tensor, x: Tensor, group: str, layer: int, block_rows: int) -> None:
        """See `sgmv_apply`."""
        shape = self._groups.get(group)
        if shape is None:
            raise ValueError(f"group: got {group!r}, wanted one of {', '.join(self._groups)}")
        if not 0 <= layer < shape.num_layers:
            raise ValueError(f"layer: got {layer}, wanted 0 to {shape.num_layers - 1}")
        self._check("y", y, sum(shape.out_features[: shape.num_sites]))
        self._check("x", x, shape.in_features)
        if len(y) != len(x):
            raise ValueError(f"x: got {len(x)} rows, wanted {len(y)}, those of y")
        call = self._calls.get((group, layer, block_rows))
        if call is None:
            call = self._calls[group, layer, block_rows] = self._new_call(group, layer, block_rows)
        call.y, call.y_stride = y.data_ptr(), y.stride(0)
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        with torch.cuda.device(self.device):
            self._kernels.sgmv(shape, call, torch.cuda.current_stream().cuda_stream)

    def _check(self, name: str, tensor: Tensor, columns: int) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted {self.dtype} on {self.device}")
        if tensor.dim() != 2 or tensor.shape[1] != columns or tensor.stride(1) != 1:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, strides {tensor.stride()},"
                f" wanted [T, {columns}] with columns side by side"
            )

    def _new_call(self, group: str, layer: int, block_rows: int) -> Call:
        start = self._device_lists.data_ptr() + self._offsets[group]
        return Call(
            items=start + HEADER_BYTES,
            header=start,
            max_items=self._capacity[block_rows],
            layer=layer,
            dtype=DTYPES[self.dtype],
            block_rows=block_rows,
            mode=self._mode,
            pdl=self._pdl,
            workspace=self._workspace.data_ptr(),
            workspace_bytes=self._workspace.numel(),
        )

    def _new_workspace(self, memory: Memory) -> Tensor:
        wanted = max(
            self._kernels.workspace_bytes(group, self._capacity[rows], rows, self._mode)
            for group in self._groups.values()
            for rows in BLOCK_ROWS
        )
        return memory.cleared((wanted,), torch.uint8)

    def _record(self, adapter: AdapterTiles) -> dict[str, Items]:
        """An adapter's items with all filled in but its rows, by group; groups not adapted are absent."""
        records: dict[str, Items] = {}
        tile_bytes = self._pool.stride(0) * self._pool.itemsize
        for group in self.layout.groups:
            tiles = adapter.tiles.get(group.name, ())
            if not tiles:
                continue
            if len(tiles) > MAX_TILES:
                raise ValueError(f"adapter: got {len(tiles)} tiles in {group.name}, wanted at most {MAX_TILES}")
            record = np.zeros(1, ITEM)
            record["num_tiles"] = len(tiles)
            record["site_mask"] = adapter.site_masks[group.name]
            record["scales"] = adapter.scales.data_ptr()
            record["tiles"][0, : len(tiles)] = self._pool.data_ptr() + np.array(tiles) * tile_bytes
            records[group.name] = record
        return records

    def _items(self, group: GroupShape, segments: list[tuple[AdapterTiles, int, int]], block_rows: int) -> Items:
        mine = [
            (self._records[a.load_id][group.name], start, count)
            for a, start, count in segments
            if group.name in a.tiles
        ]
        if not mine:
            return np.zeros(0, ITEM)
        counts = np.array([count for _, _, count in mine])
        starts = np.array([start for _, start, _ in mine])
        num_blocks = -(-counts // block_rows)
        of = np.repeat(np.arange(len(mine)), num_blocks)
        inside = (np.arange(len(of)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)) * block_rows
        items = np.concatenate([record for record, _, _ in mine])[of]
        items["row_start"] = starts[of] + inside
        items["num_rows"] = np.minimum(counts[of] - inside, block_rows)
        if len(items) > self._capacity[block_rows]:
            raise ValueError(
                f"adapters: got {len(items)} blocks of rows, wanted at most {self._capacity[block_rows]};"
                " sort rows by adapter"
            )
        return items

    def _shares(self, group: GroupShape, items: Items, block_rows: int) -> Shares:
        room, column_blocks = self._room[group.name, block_rows]
        num_tiles = items["num_tiles"]
        most = int(num_tiles.max(initial=1))
        return shares(
            len(items),
            most,
            group.num_sites,
            bool((num_tiles < most).any()),
            room=room,
            capacity=self._capacity[block_rows],
            most_parts=-(-sum(-(-n // BLOCK) for n in group.out_features) // column_blocks),
        )

    def _send(self, group: str, items: Items, header: Shares, stage: Tensor) -> None:
        start = self._offsets[group]
        end = start + HEADER_BYTES + items.nbytes
        host = stage.numpy()
        host[start : start + HEADER_BYTES].view(np.int32)[: len(header)] = header
        host[start + HEADER_BYTES : end] = items.view(np.uint8).reshape(-1)
        self._device_lists[start:end].copy_(stage[start:end], non_blocking=True)


def sgmv_apply(y: Tensor, x: Tensor, group: str, layer: int, batch: SgmvBatch) -> None:
    """y[t] += scale * (x[t] @ A) @ B with the adapter of row t, for all sites of a group at once.

    y: [T, sum of the group's out_features] (q, k, v side by side), mutated; x: [T, in]; both in the pool's dtype and
    on its device, rows 16-byte aligned. Sums are fp32; csrc/README.md says how many bits go from shrink to expand. Rows
    without an adapter are not touched. On the current stream; may be captured. Raises ValueError or KernelError naming
    the argument that is wrong.
    """
    torch.ops.medley.sgmv(y, x, group, layer, batch.lora.handle, batch.block_rows)


def _sgmv(y: Tensor, x: Tensor, group: str, layer: int, lora: int, block_rows: int) -> None:
    _known[lora].apply(y, x, group, layer, block_rows)


_handles = itertools.count()
_known: WeakValueDictionary[int, SgmvLora] = WeakValueDictionary()
register("sgmv(Tensor(a!) y, Tensor x, str group, int layer, int lora, int block_rows)", _sgmv)


def _group(layout: FragmentLayout, group: GroupShape) -> Group:
    outs = (*group.out_features, *(0,) * (MAX_SITES - group.num_sites))
    return Group(
        in_features=group.in_features,
        num_sites=group.num_sites,
        out_features=(c_int32 * MAX_SITES)(*outs),
        first_site=group.first_site,
        model_sites=len(SITES),
        num_layers=layout.num_layers,
    )


def _block_rows(segments: list[tuple[AdapterTiles, int, int]], num_tokens: Sequence[int]) -> int:
    """Rows of a step's items. Small ones where it may replay a graph: of decode rows alone, or of fewer tokens."""
    if max(num_tokens) == 1 or sum(num_tokens) < LARGE_TOKENS:
        return SMALL_ROWS
    num_small, num_large = (sum(-(-count // rows) for _, _, count in segments) for rows in BLOCK_ROWS)
    return LARGE_ROWS if num_small >= LARGE_SHARE * num_large else SMALL_ROWS


def _segments(
    adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int]
) -> list[tuple[AdapterTiles, int, int]]:
    """(adapter, first row, rows) of each run of rows that share an adapter."""
    segments: list[tuple[AdapterTiles, int, int]] = []
    row = 0
    for adapter, count in zip(adapters, num_tokens, strict=True):
        if adapter is not None and count:
            last = segments[-1] if segments else None
            if last is not None and last[0] is adapter and last[1] + last[2] == row:
                segments[-1] = (adapter, last[1], last[2] + count)
            else:
                segments.append((adapter, row, count))
        row += count
    return segments
