"""How the work of a step's LoRA sites is divided among the thread blocks of a device: the header of a work list.

Few items (blocks of rows that share an adapter) are cut into many units, so that they fill the device too; many are
not, since a unit costs something of its own. Nothing here changes a bit of any result (csrc/README.md).
"""

from __future__ import annotations

from typing import NamedTuple

PAIRS_IN_STAGE, TILES_IN_STAGE = 4, 2  # at the most
SLICES = 8  # of K, where it is not divided more finely


class Shares(NamedTuple):
    """A header, in the order of csrc/medley.h. Those after column_parts are for mode "bulk"."""

    items: int
    column_parts: int  # into which expand divides an item's columns
    pairs: int  # (tile, site) in a stage of shrink
    tiles: int  # in a stage of expand
    is_halved: bool  # shrink divides K into twice as many units
    pair_parts: int  # into which shrink divides an item's pairs
    part_pairs: int  # pairs in each of these
    has_deep_rings: bool  # more bytes on their way


def shares(
    num_items: int, num_tiles: int, num_sites: int, is_mixed: bool, *, room: int, capacity: int, most_parts: int
) -> Shares:
    """The division of one group's items.

    num_tiles: of the item that has the most; num_sites: of the group; is_mixed: some items have fewer tiles; room:
    units that the device works on at once; capacity: items that the workspace has room for; most_parts: into how many
    parts dividing the columns pays.
    """
    items, pairs = max(1, num_items), num_tiles * num_sites
    passes = -(-pairs // PAIRS_IN_STAGE)
    stage = -(-pairs // passes)
    # Pairs first: they share nothing but x. Half a strand of K is one more plane to add.
    part_passes = -(-passes // max(1, min(room // (items * SLICES), passes)))
    pair_parts = -(-passes // part_passes)
    is_halved = items * 2 <= capacity and items * SLICES * pair_parts * 2 <= room
    return Shares(
        items=num_items,
        column_parts=max(1, min(room // items, most_parts)),
        pairs=stage,
        tiles=min(num_tiles, TILES_IN_STAGE),
        is_halved=is_halved,
        pair_parts=pair_parts,
        part_pairs=part_passes * stage,
        has_deep_rings=is_mixed,
    )
