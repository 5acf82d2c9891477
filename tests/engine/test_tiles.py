"""Who holds tiles: eviction by next use, pins, and no tile ever lost."""

from __future__ import annotations

import random

from medley_worker.engine.tiles import TilePool


def filled(*sizes: int, num_tiles: int = 10) -> TilePool[str]:
    pool: TilePool[str] = TilePool(num_tiles)
    for name, size in zip("abcdef", sizes, strict=False):
        pool.acquire(name, size)
    return pool


def test_free_tiles_need_no_victims() -> None:
    assert filled(3, 3).victims(4) == []


def test_without_a_known_next_use_the_least_recently_used_goes() -> None:
    pool = filled(3, 3, 3)
    pool.touch("a")
    assert pool.victims(3) == ["b"]
    assert pool.victims(5) == ["b", "c"]


def test_what_is_used_farthest_from_now_goes_before_what_is_used_soon() -> None:
    pool = filled(3, 3, 3)
    pool.set_upcoming(["b", "x", "c", "b"])
    assert pool.victims(9) == ["a", "c", "b"]


def test_pinned_tiles_stay() -> None:
    pool = filled(3, 3, 3)
    pool.pin("a")
    pool.pin("a")
    assert pool.victims(7) == ["b", "c"]
    assert pool.victims(8) is None
    pool.unpin("a")
    assert pool.victims(8) is None
    pool.unpin("a")
    assert pool.victims(8) == ["b", "c", "a"]


def test_no_tile_is_lost_under_random_use() -> None:
    chooser = random.Random(5)
    pool: TilePool[int] = TilePool(23)
    pins: list[int] = []
    for _ in range(3000):
        action = chooser.random()
        if action < 0.5:
            owner, size = chooser.randrange(40), chooser.randint(1, 9)
            victims = None if owner in pool else pool.victims(size)
            if victims is not None:
                for victim in victims:
                    pool.release(victim)
                assert len(set(pool.acquire(owner, size))) == size
        elif action < 0.7 and pool.owners():
            owner = chooser.choice(pool.owners())
            pool.pin(owner)
            pins.append(owner)
        elif action < 0.9 and pins:
            pool.unpin(pins.pop(chooser.randrange(len(pins))))
        else:
            pool.set_upcoming([chooser.randrange(40) for _ in range(5)])
        pool.check_integrity()
        assert all(pool.is_pinned(owner) for owner in pins)
