"""Where LoRA weights lie: the layout of a rank tile, and the stage from which the CPU's batched products read.

A tile is 8 ranks of one projection group over all layers. The pool of tiles is the adapters' memory; the stage
holds copies of those in use, block by block, as a batched product wants them: [blocks, in, R] and
[blocks, R, out]. A kernel that takes pointers needs no stage. Neither knows whose an adapter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.spec.base_models import BaseModel, linear_sites

TILE_RANKS = 8
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Blocks kept past those in use, so that a step whose adapters change by a few copies a few.
STALE_SHARE, STALE_FLOOR = 1.25, 4


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Sites that share one input. `first_site` is the place of its first in SITES."""

    name: str
    first_site: int
    in_features: int
    out_features: tuple[int, ...]

    @property
    def num_sites(self) -> int:
        return len(self.out_features)


@dataclass(frozen=True, slots=True)
class TileLayout:
    """The shape of a tile. All tiles have one size, that of the largest group, so that any tile fits any group.

    A group's tile holds, from its start: A of all sites [L, in, sites, 8]; then B [L, 8, out] site by site.
    """

    num_layers: int
    groups: tuple[GroupShape, ...]

    def group(self, name: str) -> GroupShape:
        return next(group for group in self.groups if group.name == name)

    def a_elements(self, group: GroupShape) -> int:
        return self.num_layers * group.in_features * group.num_sites * TILE_RANKS

    def group_elements(self, group: GroupShape) -> int:
        """Numbers that a group's tile holds, from its start."""
        return self.a_elements(group) + self.num_layers * TILE_RANKS * sum(group.out_features)

    @property
    def tile_elements(self) -> int:
        """Numbers in one tile."""
        return max(map(self.group_elements, self.groups))

    def a_view(self, tiles: Tensor, group: GroupShape) -> Tensor:
        """[n, L, in, sites, 8] of tiles [n, tile_elements]."""
        shape = (self.num_layers, group.in_features, group.num_sites, TILE_RANKS)
        return tiles[:, : self.a_elements(group)].view(len(tiles), *shape)

    def b_view(self, tiles: Tensor, group: GroupShape, site: int) -> Tensor:
        """[n, L, 8, out] of tiles [n, tile_elements], for the site'th of the group."""
        before = self.num_layers * TILE_RANKS * sum(group.out_features[:site])
        start, width = self.a_elements(group) + before, group.out_features[site]
        shape = (self.num_layers, TILE_RANKS, width)
        return tiles[:, start : start + self.num_layers * TILE_RANKS * width].view(len(tiles), *shape)

    def write(self, tile: Tensor, group: GroupShape, in_group: int, layer: int, a: Tensor, b: Tensor) -> None:
        """Write one site of one layer. tile: [tile_elements], mutated. a: [r, in], b: [out, r], r at most 8."""
        self.write_layers(tile, group, in_group, [layer], a.unsqueeze(0), b.unsqueeze(0))

    def write_layers(
        self, tile: Tensor, group: GroupShape, in_group: int, layers: list[int], a: Tensor, b: Tensor
    ) -> None:
        """Write one site of n layers. tile: [tile_elements], mutated. a: [n, r, in], b: [n, out, r], r at most 8."""
        ranks = a.shape[1]
        self.a_view(tile.unsqueeze(0), group)[0, :, :, in_group, :ranks][layers] = a.transpose(1, 2)
        self.b_view(tile.unsqueeze(0), group, in_group)[0, :, :ranks][layers] = b.transpose(1, 2)


def tile_layout(model: BaseModel) -> TileLayout:
    """The layout that this model's linear layers give."""
    sites = linear_sites(model)
    groups: list[GroupShape] = []
    for name in dict.fromkeys(site.group for site in sites):
        members = [i for i, site in enumerate(sites) if site.group == name]
        outs = tuple(sites[i].out_features for i in members)
        groups.append(GroupShape(name, members[0], sites[members[0]].in_features, outs))
    return TileLayout(model.num_layers, tuple(groups))


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTiles:
    """A resident adapter. `load_id` is new with each load, so a copy of what was there before is never taken for it."""

    load_id: int
    tiles: Mapping[str, tuple[int, ...]]  # group -> its tiles, in the order of ranks; groups not adapted are absent
    scales: Tensor  # [L, sites] float32, 0 where not adapted
    site_masks: Mapping[str, int]  # group -> bit s: its site s is adapted in some layer


class LoraStack:
    """The staged blocks of one (group, rank class)."""

    def __init__(self, layout: TileLayout, group: GroupShape, num_tiles: int, device: torch.device | str) -> None:
        self.layout, self.group, self.num_tiles = layout, group, num_tiles
        self.rank = num_tiles * TILE_RANKS
        self.holder: list[tuple[int, int] | None] = []  # slot -> (load_id, copy)
        self.slot_of: dict[tuple[int, int], int] = {}
        layers = layout.num_layers
        self._a = torch.empty((0, layers, group.in_features, group.num_sites * self.rank), device=device)
        self._b = [torch.empty((0, layers, self.rank, out), device=device) for out in group.out_features]
        self.a_layers: tuple[Tensor, ...] = ()
        self.b_layers: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def num_slots(self) -> int:
        return len(self.holder)

    def assign(self, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Give every wanted (load_id, copy) a slot. Returns (slot, index into wanted) of those to be written."""
        keep = set(wanted)
        if self.num_slots > STALE_SHARE * len(wanted) + STALE_FLOOR:
            self._truncate(len(wanted))
        missing = [i for i, key in enumerate(wanted) if key not in self.slot_of]
        stale = iter([slot for slot, key in enumerate(self.holder) if key not in keep])
        written: list[tuple[int, int]] = []
        for i in missing:
            slot = next(stale, None)
            if slot is None:
                slot = self.num_slots
                self.holder.append(None)
            previous = self.holder[slot]
            if previous is not None:
                del self.slot_of[previous]
            self.holder[slot] = wanted[i]
            self.slot_of[wanted[i]] = slot
            written.append((slot, i))
        return written

    def check_integrity(self) -> None:
        """Raises AssertionError unless slots and holders agree and there is memory for every slot."""
        held = {key: slot for slot, key in enumerate(self.holder) if key is not None}
        assert held == self.slot_of, "a slot is lost or held twice"
        assert self.num_slots <= len(self._a), "a slot has no memory"

    def _truncate(self, size: int) -> None:
        for key in self.holder[size:]:
            if key is not None:
                del self.slot_of[key]
        del self.holder[size:]

    def write(self, slots: list[int], tile_ids: Tensor, scales: Tensor, pool: Tensor) -> None:
        """Copy k adapters' tiles ([k * num_tiles]) into slots, scales ([k, L, sites of the group]) folded into B."""
        self._reserve()
        device, count = self._a.device, len(slots)
        at = torch.tensor(slots, device=device)
        a = self.layout.a_view(pool, self.group).index_select(0, tile_ids).to(torch.float32)
        # [k, tiles, L, in, sites, 8] -> [k, L, in, sites, tiles * 8]
        a = a.view(count, self.num_tiles, *a.shape[1:]).permute(0, 2, 3, 4, 1, 5)
        self._a.index_copy_(0, at, a.reshape(count, *self._a.shape[1:]))
        for site, stack in enumerate(self._b):
            b = self.layout.b_view(pool, self.group, site).index_select(0, tile_ids).to(torch.float32)
            b = b.view(count, self.num_tiles, *b.shape[1:]).transpose(1, 2).reshape(count, *stack.shape[1:])
            stack.index_copy_(0, at, b * scales[:, :, site, None, None])

    def _reserve(self) -> None:
        capacity = len(self._a)
        if self.num_slots <= capacity:
            return
        more = max(self.num_slots, 2 * capacity) - capacity
        self._a = torch.cat((self._a, self._a.new_zeros((more, *self._a.shape[1:]))))
        self._b = [torch.cat((b, b.new_zeros((more, *b.shape[1:])))) for b in self._b]

    def refresh_views(self) -> None:
        """Make the per-layer views that a step reads, over the slots there are now."""
        self.a_layers = self._a[: self.num_slots].unbind(1)
        self.b_layers = tuple(b[: self.num_slots].unbind(1) for b in self._b)


class LoraStage:
    """Copies of the adapters in use, laid out for batched products; grows with what steps need."""

    def __init__(self, layout: TileLayout, pool: Tensor) -> None:
        """pool: [num_tiles + 1, tile_elements]; the last tile is all zeros and pads ranks."""
        self.layout = layout
        self.device = pool.device
        self._pool = pool
        self._zero_tile = len(pool) - 1
        self._stacks: dict[tuple[str, int], LoraStack] = {}

    def rank_class(self, adapter: AdapterTiles, group: str) -> int:
        """The adapter's tiles in a group, rounded up to a power of two; 0: the group is not adapted."""
        num_tiles = len(adapter.tiles.get(group, ()))
        return 0 if num_tiles == 0 else 1 << (num_tiles - 1).bit_length()

    def place(self, group: str, num_tiles: int, wanted: list[tuple[AdapterTiles, int]]) -> tuple[LoraStack, list[int]]:
        """The stack of a (group, rank class) with all wanted (adapter, copy) in it, and their slots."""
        stack = self._stacks.get((group, num_tiles))
        if stack is None:
            stack = LoraStack(self.layout, self.layout.group(group), num_tiles, self.device)
            self._stacks[group, num_tiles] = stack
        keys = [(adapter.load_id, copy) for adapter, copy in wanted]
        before = stack.num_slots
        written = stack.assign(keys)
        if written:
            adapters = [wanted[i][0] for _, i in written]
            first = stack.group.first_site
            scales = torch.stack([adapter.scales for adapter in adapters])
            stack.write(
                [slot for slot, _ in written],
                torch.tensor(self._padded_tiles(adapters, group, num_tiles), device=self.device),
                scales[:, :, first : first + stack.group.num_sites],
                self._pool,
            )
        if written or before != stack.num_slots:
            stack.refresh_views()
        return stack, [stack.slot_of[key] for key in keys]

    def check_integrity(self) -> None:
        """Raises AssertionError unless every stack is sound."""
        for stack in self._stacks.values():
            stack.check_integrity()

    def _padded_tiles(self, adapters: Iterable[AdapterTiles], group: str, num_tiles: int) -> list[int]:
        padded: list[int] = []
        for adapter in adapters:
            tiles = adapter.tiles[group]
            padded += [*tiles, *[self._zero_tile] * (num_tiles - len(tiles))]
        return padded
