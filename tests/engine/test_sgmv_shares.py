"""How the work of a step's LoRA sites is divided: all of it, once, within the room that there is."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from medley_worker.ops.sgmv_shares import PAIRS_IN_STAGE, SLICES, Shares, shares

ROOM = 528  # thread blocks of SGMV that an H200 holds at once


def of(num_items: int, num_tiles: int, num_sites: int, is_mixed: bool = False, capacity: int = 1024) -> Shares:
    return shares(num_items, num_tiles, num_sites, is_mixed, room=ROOM, capacity=capacity, most_parts=96)


@settings(deadline=None)
@given(
    num_items=st.integers(0, 1024),
    num_tiles=st.integers(1, 16),
    num_sites=st.integers(1, 3),
    is_mixed=st.booleans(),
    capacity=st.integers(1, 1024),
)
def test_every_pair_is_in_one_part(
    num_items: int, num_tiles: int, num_sites: int, is_mixed: bool, capacity: int
) -> None:
    found, pairs = of(num_items, num_tiles, num_sites, is_mixed, capacity), num_tiles * num_sites
    assert found.items == num_items
    assert 1 <= found.pairs <= PAIRS_IN_STAGE
    assert found.part_pairs % found.pairs == 0
    assert (found.pair_parts - 1) * found.part_pairs < pairs <= found.pair_parts * found.part_pairs
    assert found.tiles in (1, 2)
    assert found.tiles <= num_tiles
    assert 1 <= found.column_parts <= 96


@settings(deadline=None)
@given(num_items=st.integers(1, 1024), num_tiles=st.integers(1, 16), num_sites=st.integers(1, 3))
def test_what_is_cut_finely_fits_the_device_and_the_workspace(num_items: int, num_tiles: int, num_sites: int) -> None:
    found = of(num_items, num_tiles, num_sites, capacity=40)
    units = num_items * SLICES * found.pair_parts * (2 if found.is_halved else 1)
    assert units <= max(ROOM, num_items * SLICES)
    assert not found.is_halved or num_items * 2 <= 40


def test_one_adapter_fills_the_device_and_many_are_not_cut() -> None:
    assert of(4, 2, 3) == Shares(4, 96, 3, 2, is_halved=True, pair_parts=2, part_pairs=3, has_deep_rings=False)
    assert of(4, 8, 3)[4:] == (True, 6, 4, False)  # rank 64
    assert of(64, 2, 3) == Shares(64, 8, 3, 2, is_halved=False, pair_parts=1, part_pairs=6, has_deep_rings=False)


def test_mixed_ranks_have_deep_rings() -> None:
    assert of(32, 8, 3, is_mixed=True).has_deep_rings
    assert not of(32, 8, 3).has_deep_rings
