"""Pages, rows and the scheduler under random schedules, checked after every operation. No torch here."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import numpy as np
import pytest

from medley.spec.errors import ErrorCode
from medley.spec.sampling import SamplingParams
from medley_worker.engine.pages import PagePool
from medley_worker.engine.plans import StepPlan
from medley_worker.engine.rows import RowTable
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import AdapterKey, Refused, Sequence

EOS = 0


class CountedTiles:
    """A Residency of `num_tiles` tiles; adapter n takes n tiles. The real one is tested in test_engine.py."""

    def __init__(self, num_tiles: int) -> None:
        self.num_tiles = num_tiles
        self.tiles_of: dict[AdapterKey, int] = {}
        self.pinned: set[AdapterKey] = set()
        self.upcoming: list[AdapterKey] = []
        self.evicted: list[AdapterKey] = []
        self.unread: set[AdapterKey] | None = None  # of a residency that reads ahead

    @property
    def loads_ahead(self) -> bool:
        return self.unread is not None

    def is_ready(self, key: AdapterKey) -> bool:
        return self.unread is None or key not in self.unread

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self.tiles_of

    def can_admit(self, key: AdapterKey) -> bool:
        need = int(str(key[1]))
        if need > self.num_tiles:
            raise Refused(ErrorCode.ADAPTER_TOO_LARGE, f"wants {need} tiles of {self.num_tiles}")
        pinned = sum(self.tiles_of[k] for k in self.pinned)
        return self.is_resident(key) or need <= self.num_tiles - pinned

    def load(self, key: AdapterKey, sequence: Sequence) -> None:
        del sequence
        need = int(str(key[1]))
        while sum(self.tiles_of.values()) + need > self.num_tiles:
            idle = [k for k in self.tiles_of if k not in self.pinned]
            ranks = {k: i for i, k in enumerate(self.upcoming)}
            victim = max(idle, key=lambda k: ranks.get(k, len(ranks)))
            del self.tiles_of[victim]
            self.evicted.append(victim)
        self.tiles_of[key] = need

    def pin(self, key: AdapterKey) -> None:
        assert key in self.tiles_of
        assert key not in self.pinned, "the scheduler pins an adapter once, however many rows use it"
        self.pinned.add(key)

    def unpin(self, key: AdapterKey) -> None:
        self.pinned.remove(key)

    def set_upcoming(self, keys: Seq[AdapterKey]) -> None:
        self.upcoming = list(keys)


class Rig:
    """A scheduler with its owners and a forward pass that draws token ids from the position."""

    def __init__(
        self,
        *,
        rows: int = 4,
        pages: int = 12,
        page_size: int = 4,
        budget: int = 8,
        tiles: int = 6,
        max_len: int = 40,
    ) -> None:
        self.rows = RowTable(rows, max_len, page_size, (EOS,))
        self.pages = PagePool(pages, page_size)
        self.tiles = CountedTiles(tiles)
        self.scheduler = Scheduler(self.rows, self.pages, self.tiles, max_tokens=budget)
        self.budget = budget
        self.outputs: dict[object, list[int]] = {}
        self.failed: dict[object, ErrorCode] = {}
        self.num_made = 0

    def make(self, prompt_len: int, max_tokens: int, adapter: int | None = None, priority: int = 0) -> Sequence:
        self.num_made += 1
        sequence = Sequence(
            request_id=self.num_made,
            prompt=np.full(prompt_len, 7, np.int32),
            sampling=SamplingParams(max_tokens=max_tokens),
            seed=0,
            adapter=None if adapter is None else ("t", str(adapter)),
            priority=priority,
            order=self.num_made,
            is_streamed=False,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._check_plan(plan)
        for sequence, error in plan.failed:
            self.failed[sequence.request_id] = error.code
        sampled = np.concatenate([plan.decode_rows, [c.row for c in plan.chunks if c.is_last]]).astype(np.int64)
        self.scheduler.advance(plan)
        tokens = 1 + self.rows.num_tokens[sampled] % 50
        places = self.scheduler.expect(sampled)
        is_stop, is_long = self.rows.write(sampled, places, tokens, np.zeros(len(sampled), np.float32))
        for row in sampled[is_stop | is_long].tolist():
            sequence = self.scheduler.end_row(row)
            self.outputs[sequence.request_id] = sequence.output_ids.tolist()
        self.scheduler.check_integrity()
        return plan

    def _check_plan(self, plan: StepPlan) -> None:
        num_tokens = len(plan.decode_rows) + sum(c.num_tokens for c in plan.chunks)
        assert num_tokens <= self.budget
        in_step = [*plan.decode_rows.tolist(), *(c.row for c in plan.chunks)]
        assert len(set(in_step)) == len(in_step), "a row is in the step twice"
        for phase in (plan.decode_rows.tolist(), [c.row for c in plan.chunks]):
            indices = [int(self.rows.adapter_index[row]) for row in phase]
            assert indices == sorted(indices), "segments of an adapter are not contiguous"
            for index in indices:
                key = self.scheduler.adapter_of(index)
                assert key is None or key in self.tiles.pinned, "a row runs with an adapter that is not pinned"
        for row in plan.decode_rows.tolist():
            assert self.rows.num_computed[row] < self.rows.num_pages[row] * self.rows.page_size
        for chunk in plan.chunks:
            assert chunk.start + chunk.num_tokens <= self.rows.num_pages[chunk.row] * self.rows.page_size

    def run(self, limit: int = 10_000) -> None:
        while self.scheduler.has_work:
            limit -= 1
            assert limit, "the schedule does not end"
            self.step()


def expected(sequence: Sequence, max_len: int = 40) -> list[int]:
    prompt_len = len(sequence.prompt)
    end = min(prompt_len + sequence.sampling.max_tokens, max_len)
    return [1 + n % 50 for n in range(prompt_len, end)]


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_keep_every_owner_whole_and_every_token_once(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(
        rows=rng.choice([1, 3, 5]),
        pages=rng.choice([10, 14, 30]),
        budget=rng.choice([5, 9, 30]),
        tiles=rng.choice([4, 7]),
    )
    live: dict[object, Sequence] = {}
    whole: dict[object, Sequence] = {}
    for _ in range(250):
        action = rng.random()
        if action < 0.35:
            made = rig.make(
                rng.randint(1, 20), rng.randint(1, 25), rng.choice([None, 1, 2, 3, 4]), rng.choice([0, 0, 1])
            )
            live[made.request_id] = made
        elif action < 0.42 and live:
            gone = live.pop(rng.choice(list(live)))
            if gone.request_id not in rig.outputs:
                rig.scheduler.remove(gone)
                assert gone.output_ids.tolist() == expected(gone)[: len(gone.output_ids)]
                if rng.random() < 0.5:  # come back with what it had generated
                    rig.scheduler.add(gone)
                    live[gone.request_id] = gone
            rig.scheduler.check_integrity()
        else:
            rig.step()
        whole.update(live)
    rig.run()
    assert not rig.failed
    for request_id, sequence in live.items():
        assert rig.outputs[request_id] == expected(sequence)
    assert rig.pages.num_used == 0
    assert not rig.tiles.pinned


def test_a_page_pool_refuses_to_free_a_page_twice() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(3)
    pool.check_integrity(pages)
    pool.free(pages[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages[:1])


def test_a_prompt_longer_than_the_budget_is_cut_into_chunks() -> None:
    rig = Rig(budget=8)
    rig.make(19, 1)
    sizes = [rig.step().chunks[0].num_tokens for _ in range(3)]
    assert sizes == [8, 8, 3]
    assert not rig.scheduler.has_work


def test_decode_rows_come_before_prompt_chunks() -> None:
    rig = Rig(budget=4)
    first = rig.make(2, 10)
    rig.step()
    rig.make(9, 1)
    plan = rig.step()
    assert plan.decode_rows.tolist() == [first.row]
    assert [c.num_tokens for c in plan.chunks] == [3]


def test_preemption_takes_the_last_admitted_and_keeps_its_tokens() -> None:
    rig = Rig(rows=2, pages=6, page_size=4, budget=40)
    old, new = rig.make(8, 12), rig.make(8, 12)
    preempted = 0
    while old.request_id not in rig.outputs:
        preempted += rig.step().num_preempted
        assert old.row is not None or old.request_id in rig.outputs
    assert preempted == 1
    rig.run()
    assert rig.outputs[new.request_id] == expected(new)


def test_priority_is_preempted_last_and_admitted_first() -> None:
    rig = Rig(rows=2, pages=6, page_size=4, budget=40)
    low, high, higher = rig.make(8, 12), rig.make(8, 12, priority=1), rig.make(4, 2, priority=2)
    plan = rig.step()
    assert next(s.request_id for s in plan.entering) == higher.request_id
    while high.request_id not in rig.outputs:
        rig.step()
    assert low.request_id not in rig.outputs


def test_a_request_whose_adapter_does_not_fit_now_does_not_hold_up_the_line() -> None:
    rig = Rig(rows=4, tiles=4, budget=40)
    rig.make(4, 20, adapter=3)
    wide = rig.make(4, 1, adapter=4)
    small = rig.make(4, 1, adapter=1)
    plan = rig.step()
    assert [s.request_id for s in plan.entering] == [1, small.request_id]
    rig.run()
    assert set(rig.outputs) == {1, wide.request_id, small.request_id}


def test_for_a_request_that_is_skipped_often_an_adapter_leaves() -> None:
    rig = Rig(rows=2, tiles=4, pages=30, budget=40)
    rig.make(2, 3, adapter=3)
    wide = rig.make(2, 1, adapter=4)
    for _ in range(60):
        rig.make(2, 3, adapter=3)
    num_before = 0
    while wide.request_id not in rig.outputs:
        rig.step()
        num_before = len(rig.outputs)
    assert num_before <= 8


def test_while_one_adapter_leaves_the_others_go_on() -> None:
    rig = Rig(rows=4, tiles=4, pages=60, budget=40)
    others = [rig.make(2, 3, adapter=1), rig.make(2, 3, adapter=2)]
    waiting = rig.make(2, 1, adapter=3)
    others += [rig.make(2, 3 + i % 3, adapter=1 + i % 2) for i in range(80)]
    entered: dict[str, int] = {}
    num_due = 0  # steps since it was skipped too often; in the first of them it is found out
    while waiting.request_id not in rig.outputs:
        num_due += waiting.num_skips >= 2 * 4
        for sequence in rig.step().entering:
            if num_due > 1:
                assert sequence.adapter is not None
                entered[sequence.adapter[1]] = entered.get(sequence.adapter[1], 0) + 1
    assert waiting.num_skips <= 20
    assert entered.pop("3") == 1
    assert len(entered) == 1
    assert sum(entered.values()) >= 2
    rig.run()
    assert all(sequence.request_id in rig.outputs for sequence in others)


def test_an_adapter_that_is_still_read_is_passed_without_losing_its_turn() -> None:
    rig = Rig(rows=2, tiles=4, pages=30, budget=40)
    rig.tiles.unread = {("t", "3")}
    slow = rig.make(2, 1, adapter=3)
    for _ in range(20):
        rig.make(2, 3, adapter=1)
    for _ in range(30):
        plan = rig.step()
        assert slow not in plan.entering
        assert rig.tiles.upcoming[:1] == [("t", "3")] or not rig.tiles.upcoming
    assert slow.num_skips == 0
    rig.tiles.unread.clear()
    plan = rig.step()
    assert plan.entering == [slow], "the line is looked at again when an adapter is there"
    rig.run()


def test_an_adapter_that_can_never_fit_fails_its_job_alone() -> None:
    rig = Rig(tiles=4)
    bad, good = rig.make(4, 2, adapter=5), rig.make(4, 2, adapter=4)
    rig.run()
    assert rig.failed == {bad.request_id: ErrorCode.ADAPTER_TOO_LARGE}
    assert rig.outputs[good.request_id] == expected(good)


def test_the_waiting_line_tells_which_adapter_comes_next() -> None:
    rig = Rig(rows=1, tiles=4, budget=40)
    rig.make(2, 1, adapter=1)
    rig.step()
    rig.make(2, 1, adapter=2)
    rig.step()
    for adapter in (3, 1):
        rig.make(2, 1, adapter=adapter)
    rig.scheduler.set_upcoming([("t", "2")])
    rig.step()
    assert rig.tiles.upcoming == [("t", "3"), ("t", "1"), ("t", "2")]
    assert rig.tiles.evicted == [("t", "2")]


def test_a_budget_below_the_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Rig(rows=4, budget=3)
