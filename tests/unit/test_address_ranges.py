"""Ranges of addresses: mapped piece by piece, given back whole, and gone on with where the device had no more.

With a stand-in for the driver; tests/kernels/test_sleep_cuda.py runs the same on a device.
"""

from __future__ import annotations

import itertools
from typing import cast

import pytest

from medley_worker.ops.kernels import KernelError, Kernels
from medley_worker.ops.memory_cuda import PIECE_BYTES, Range

UNIT = 2 << 20
BASE = 1 << 40


class Driver:
    """A device with so much memory, which notes what is mapped where."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes
        self.mapped: dict[int, tuple[int, int]] = {}  # handle -> (address, bytes)
        self._handles = itertools.count(1)

    def granularity(self, _device: int) -> int:
        return UNIT

    def reserve(self, num_bytes: int) -> int:
        assert num_bytes % UNIT == 0
        return BASE

    def map(self, _device: int, address: int, num_bytes: int) -> int:
        assert address % UNIT == num_bytes % UNIT == 0
        if num_bytes > self.left:
            raise KernelError(f"memory of {num_bytes} bytes: out of memory")
        self.left -= num_bytes
        handle = next(self._handles)
        self.mapped[handle] = (address, num_bytes)
        return handle

    def unmap(self, address: int, num_bytes: int, handle: int) -> None:
        assert self.mapped.pop(handle) == (address, num_bytes)
        self.left += num_bytes


def new_range(driver: Driver, num_bytes: int) -> Range:
    return Range(cast(Kernels, driver), 0, num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, UNIT, UNIT + 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES - 7])
def test_pieces_cover_a_range_once_and_go_back_whole(num_bytes: int) -> None:
    driver = Driver(10 * PIECE_BYTES)
    made = new_range(driver, num_bytes)
    assert made.num_bytes % UNIT == 0
    assert made.num_bytes - UNIT < max(num_bytes, 1) <= made.num_bytes
    for _ in range(2):
        pieces = list(made.map())
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == made.num_bytes == made.num_mapped
        assert sorted(driver.mapped.values()) == [(BASE + p.start, p.stop - p.start) for p in pieces]
        assert list(made.map()) == []
        made.unmap()
        assert made.num_mapped == 0
        assert driver.left == 10 * PIECE_BYTES


def test_mapping_goes_on_where_memory_ran_out() -> None:
    driver = Driver(2 * PIECE_BYTES)
    made = new_range(driver, 3 * PIECE_BYTES)
    pieces = made.map()
    assert [next(pieces).stop, next(pieces).stop] == [PIECE_BYTES, 2 * PIECE_BYTES]
    with pytest.raises(KernelError, match="out of memory"):
        next(pieces)
    assert made.num_mapped == 2 * PIECE_BYTES
    driver.left += PIECE_BYTES
    assert [piece.start for piece in made.map()] == [2 * PIECE_BYTES]
    made.unmap()
    assert driver.mapped == {}
