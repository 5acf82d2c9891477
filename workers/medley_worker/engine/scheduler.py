"""Decides what each step runs: decode rows first, then prompt chunks, within a token budget.

Owns the waiting line, and the pairing of rows, pages and adapter pins. Plain ints and arrays; knows nothing
of tensors, files or messages. What an adapter costs it asks of a `Residency`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from collections.abc import Set
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medley_worker.engine.pacing import Pace
from medley_worker.engine.pages import PagePool
from medley_worker.engine.plans import Chunk, Rows, StepPlan
from medley_worker.engine.rows import RowTable
from medley_worker.engine.sequences import AdapterKey, Refused, Sequence


class Residency(Protocol):
    """Adapter memory as the scheduler sees it. `can_admit`, `load` raise Refused where there is no hope."""

    @property
    def loads_ahead(self) -> bool:
        """Whether what `set_upcoming` names is read ahead of need, and `is_ready` may say no."""
        ...

    def is_resident(self, key: AdapterKey) -> bool: ...

    def can_admit(self, key: AdapterKey) -> bool:
        """Whether it is resident, or fits after evicting adapters that no row uses."""
        ...

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether `load` would not wait for a disk."""
        ...

    def load(self, key: AdapterKey, sequence: Sequence) -> None: ...

    def pin(self, key: AdapterKey) -> None: ...

    def unpin(self, key: AdapterKey) -> None: ...

    def set_upcoming(self, keys: Seq[AdapterKey]) -> None: ...


class Scheduler:
    """Continuous batching over `rows` and `pages`.

    max_tokens: token budget of a step; at least the number of rows, so that prompts always progress.
    pace: what holds the time per output token to a bound; None for the most tokens a second.
    """

    def __init__(
        self, rows: RowTable, pages: PagePool, residency: Residency, *, max_tokens: int, pace: Pace | None = None
    ) -> None:
        if max_tokens < rows.num_rows:
            raise ValueError(
                f"max_num_batched_tokens: got {max_tokens}, wanted at least max_num_seqs ({rows.num_rows})"
            )
        self._rows = rows
        self._pages = pages
        self._residency = residency
        self._max_tokens = max_tokens
        self._pace = pace
        # Who is skipped this often, because its adapter did not fit, has adapters leave for it.
        self._max_skips = 2 * rows.num_rows
        self._look_ahead = 4 * rows.num_rows
        self._waiting: list[Sequence] = []  # sorted by line_key
        self._prefilling: list[int] = []  # rows, oldest first
        self._admitted_at = np.zeros(rows.num_rows, np.int64)
        self._num_admitted = 0
        self._is_line_new = False  # it or what comes after it has changed since the residency was told
        self._is_blocked = False  # the line was scanned in vain and nothing has been freed or added since
        self._adapters: list[AdapterKey | None] = [None] * (rows.num_rows + 1)  # by index; 0 is the base
        self._adapter_rows = [0] * (rows.num_rows + 1)  # rows that use it
        self._index_of: dict[AdapterKey, int] = {}
        self._leaving: set[AdapterKey] = set()  # their rows end, and none is added: others have waited long enough
        self._free_indices = list(range(rows.num_rows, 0, -1))
        self._upcoming: tuple[AdapterKey, ...] = ()
        self._decode_order: Rows | None = None  # kept while the same rows decode

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self._rows.num_used > 0

    def num_adapters_in(self, plan: StepPlan) -> int:
        """Distinct adapters among the rows of a step, the base not counted."""
        indices = self._rows.adapter_index[plan.decode_rows]
        if plan.chunks:
            in_chunks = self._rows.adapter_index[[chunk.row for chunk in plan.chunks]]
            indices = np.sort(np.concatenate([indices, in_chunks]))
        if len(indices) == 0:
            return 0
        return int(np.count_nonzero(np.diff(indices))) + int(indices[0] != 0)

    def adapter_of(self, index: int) -> AdapterKey | None:
        """The adapter behind a value of `rows.adapter_index`; None for 0, the base."""
        return self._adapters[index]

    def set_upcoming(self, keys: Seq[AdapterKey]) -> None:
        """Adapters that come after those of the waiting line, nearest first."""
        self._upcoming = tuple(keys)
        self._is_line_new = True

    def forget_upcoming(self, keys: Set[AdapterKey]) -> None:
        """These do not come, whatever `set_upcoming` was told."""
        self.set_upcoming([key for key in self._upcoming if key not in keys])

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_line_key)
        self._is_blocked = False
        self._is_line_new = True

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out, wherever it is; its tokens are in it afterwards."""
        if sequence.row is not None:
            self.end_row(sequence.row)
        else:
            at = bisect_left(self._waiting, sequence.line_key, key=_line_key)
            assert self._waiting[at] is sequence, "a sequence without row must be in the waiting line"
            del self._waiting[at]
            self._is_blocked = False
            self._is_line_new = True

    def end_row(self, row: int) -> Sequence:
        """Free a row, its pages and its adapter's pin."""
        if not self._rows.is_decoding[row]:
            self._prefilling.remove(row)
        self._decode_order = None
        self._is_blocked = False
        index = int(self._rows.adapter_index[row])
        sequence, pages = self._rows.release(row)
        self._pages.free(pages)
        if index:
            self._unpin(index)
        return sequence

    @property
    def must_settle(self) -> bool:
        """Whether the tokens in flight must be read before `schedule`: it may preempt, or draw from output tokens."""
        rows = self._rows
        goes_on = rows.is_decoding & ~rows.is_complete
        if (goes_on & rows.is_pending & rows.needs_output).any():
            return True
        return int(np.count_nonzero(goes_on & self._is_full())) > self._pages.num_free

    def schedule(self) -> StepPlan:
        """What to run next. Rows, pages and pins are taken; `advance` is called when it is launched.

        While tokens are in flight, `must_settle` is False.
        """
        rows, num_preempted = self._rows, self._grow_decoding()
        if self._is_line_new and self._residency.loads_ahead:
            self._residency.set_upcoming(self._next_uses())
            self._is_line_new = False
        if self._decode_order is None:
            decoding = np.flatnonzero(rows.is_decoding & ~rows.is_complete)
            self._decode_order = decoding[np.argsort(rows.adapter_index[decoding], kind="stable")]
        decode_rows = self._decode_order
        if rows.is_guided.any():
            # What they may draw depends on a token in flight: they sit this step out, and the others go on.
            decode_rows = decode_rows[~(rows.is_guided & rows.is_pending)[decode_rows]]
        plan = StepPlan(decode_rows, num_preempted=num_preempted)
        budget = self._prompt_budget(len(decode_rows))
        for row in self._prefilling:
            if budget == 0:
                break
            budget -= self._add_chunk(plan, row, budget)
        # Pages that a preemption freed are for the rows that go on, not for the one just preempted.
        if budget and self._waiting and not self._is_blocked and not num_preempted and self._has_row:
            self._admit(plan, budget)
        if len(plan.chunks) > 1:
            plan.chunks.sort(key=lambda chunk: int(self._rows.adapter_index[chunk.row]))
        return plan

    def advance(self, plan: StepPlan) -> None:
        """The K, V of the step's tokens are as good as in the pages; rows whose last chunk runs now decode."""
        self._rows.num_computed[plan.decode_rows] += 1
        for chunk in plan.chunks:
            self._rows.num_computed[chunk.row] += chunk.num_tokens
            if chunk.num_targets:
                self._rows.next_target[chunk.row] = chunk.first_target + chunk.num_targets
            if chunk.is_last or self._rows.num_computed[chunk.row] == self._end_of(chunk.row):
                self._rows.is_decoding[chunk.row] = True
                self._rows.is_complete[chunk.row] = not chunk.is_last
                self._prefilling.remove(chunk.row)
                self._decode_order = None

    def expect(self, sampled: Rows) -> npt.NDArray[np.int64]:
        """A token is on its way to each of `sampled`: see `RowTable.expect`. Complete rows run no more."""
        places = self._rows.expect(sampled)
        if self._rows.is_complete[sampled].any():
            self._decode_order = None
        return places

    @property
    def _has_row(self) -> bool:
        """Whether one more sequence may run."""
        if self._pace is not None and self._rows.num_used >= self._pace.max_rows:
            return False
        return self._rows.num_free > 0

    def _prompt_budget(self, num_decode_rows: int) -> int:
        """Tokens of prompts that fit into a step beside its decode rows."""
        budget = self._max_tokens - num_decode_rows
        if self._pace is not None and num_decode_rows:
            budget = min(budget, self._pace.prompt_tokens)
        return budget

    def _is_full(self) -> npt.NDArray[np.bool_]:
        is_full: npt.NDArray[np.bool_] = self._rows.num_computed == self._rows.num_pages * self._rows.page_size
        return is_full

    def _grow_decoding(self) -> int:
        """A page for each decode row that has none for its next token; returns how many were preempted."""
        rows = self._rows
        is_full = rows.is_decoding & ~rows.is_complete & self._is_full()
        if not is_full.any():
            return 0
        num_preempted = 0
        full = np.flatnonzero(is_full)
        for row in full[np.argsort(self._admitted_at[full])].tolist():  # oldest first
            while rows.sequences[row] is not None and self._pages.num_free == 0:
                self._preempt()
                num_preempted += 1
            if rows.sequences[row] is not None:
                rows.add_page(row, self._pages.allocate(1)[0])
        return num_preempted

    def _preempt(self) -> None:
        """Send a row back to the line, its tokens kept: the lowest priority, of these the last admitted."""
        victim: tuple[int, int, int] | None = None
        for row, sequence in enumerate(self._rows.sequences):
            if sequence is not None:
                rank = (-sequence.priority, int(self._admitted_at[row]), row)
                victim = rank if victim is None or rank > victim else victim
        assert victim is not None, "pages ran out with no row running"
        assert not self._rows.is_pending[victim[2]], "a row is preempted with a token in flight"
        self.add(self.end_row(victim[2]))

    def _add_chunk(self, plan: StepPlan, row: int, budget: int) -> int:
        rows, start = self._rows, int(self._rows.num_computed[row])
        left = self._end_of(row) - start
        num_tokens = min(left, budget)
        is_last = num_tokens == left and bool(rows.is_drawn[row])
        first_target = max(int(rows.next_target[row]), start + 1)
        num_targets = max(0, min(int(rows.prompt_len[row]), start + num_tokens + 1) - first_target)
        plan.chunks.append(Chunk(row, start, num_tokens, is_last, first_target, num_targets))
        return num_tokens

    def _end_of(self, row: int) -> int:
        """How many of a prefilling row's tokens are to be computed: nothing comes after the last of a scored prompt."""
        return int(self._rows.num_tokens[row]) - (not self._rows.is_drawn[row])

    def _admit(self, plan: StepPlan, budget: int) -> None:
        rows, pages = self._rows, self._pages
        skipped: list[Sequence] = []
        taken: list[int] = []  # positions in the line that leave it
        is_reading = False
        starved: AdapterKey | None = None  # the first in line that was skipped too often
        for at, sequence in enumerate(self._waiting):
            if budget == 0 or not self._has_row or at == self._look_ahead:
                break
            num_pages = pages.num_needed(sequence.num_tokens)
            # Each running row wants another page soon: leave it one, so that admission forces no preemption.
            if num_pages + rows.num_used > pages.num_free and (rows.num_used or num_pages > pages.num_free):
                break
            key = sequence.adapter
            if key is not None and (key in self._leaving or (starved is not None and key not in self._index_of)):
                skipped.append(sequence)
                continue
            try:
                index = self._pin(sequence)
            except Refused as refused:
                plan.failed.append((sequence, refused.error))
                taken.append(at)
                continue
            if index is None:
                if not self._is_ready(sequence):
                    is_reading = True  # nobody's turn is lost: it is passed until it has been read
                    continue
                if sequence.num_skips >= self._max_skips:
                    starved = key
                skipped.append(sequence)
                continue
            for other in skipped:
                other.num_skips += 1
            row = rows.acquire(sequence, index, pages.allocate(num_pages))
            self._admitted_at[row] = self._num_admitted
            self._num_admitted += 1
            self._prefilling.append(row)
            taken.append(at)
            if not sequence.is_announced:
                plan.entering.append(sequence)
            budget -= self._add_chunk(plan, row, budget)
        if starved is not None and not self._leaving:
            self._leaving.add(self._cheapest_to_leave())
        self._is_blocked = not taken and not is_reading
        self._is_line_new |= bool(taken)
        if taken == list(range(len(taken))):
            del self._waiting[: len(taken)]
        else:
            for at in reversed(taken):
                del self._waiting[at]

    def _cheapest_to_leave(self) -> AdapterKey:
        """Of the adapters that rows use, one for which nobody waits, of these the one with the fewest rows."""
        wanted = {sequence.adapter for sequence in self._waiting[: self._look_ahead]}
        return min(self._index_of, key=lambda key: (key in wanted, self._adapter_rows[self._index_of[key]]))

    def _is_ready(self, sequence: Sequence) -> bool:
        return sequence.adapter is None or self._residency.is_ready(sequence.adapter)

    def _pin(self, sequence: Sequence) -> int | None:
        """Pin its adapter, loading it first where needed; its index, or None where it does not fit now."""
        key = sequence.adapter
        if key is None:
            return 0
        index = self._index_of.get(key)
        if index is None:
            if not self._residency.can_admit(key):
                assert self._rows.num_used, "an adapter must fit when no row runs"
                return None
            if not self._residency.is_resident(key):
                if not self._residency.is_ready(key):
                    return None
                self._residency.set_upcoming(self._next_uses())
                self._residency.load(key, sequence)
            self._residency.pin(key)
            index = self._free_indices.pop()
            self._index_of[key] = index
            self._adapters[index] = key
        self._adapter_rows[index] += 1
        return index

    def _unpin(self, index: int) -> None:
        self._adapter_rows[index] -= 1
        if self._adapter_rows[index] == 0:
            key = self._adapters[index]
            assert key is not None
            self._adapters[index] = None
            self._leaving.discard(key)
            del self._index_of[key]
            self._free_indices.append(index)
            self._residency.unpin(key)

    def _next_uses(self) -> list[AdapterKey]:
        near = [s.adapter for s in self._waiting[: self._look_ahead] if s.adapter is not None]
        return list(dict.fromkeys([*near, *self._upcoming]))

    def check_integrity(self) -> None:
        """Rows, pages, pins and the line agree with each other."""
        rows = self._rows
        rows.check_integrity()
        self._pages.check_integrity(rows.held_pages())
        keys = [s.line_key for s in self._waiting]
        assert keys == sorted(keys), "the waiting line is out of order"
        assert all(s.row is None for s in self._waiting), "a waiting sequence holds a row"
        running = [row for row, s in enumerate(rows.sequences) if s is not None]
        assert sorted(self._prefilling) == [r for r in running if not rows.is_decoding[r]], "prefilling rows are lost"
        uses: dict[AdapterKey, int] = {}
        for row in running:
            sequence = rows.sequences[row]
            assert sequence is not None
            assert self._adapters[rows.adapter_index[row]] == sequence.adapter, f"row {row} has another's adapter"
            if sequence.adapter is not None:
                uses[sequence.adapter] = uses.get(sequence.adapter, 0) + 1
        assert {k: self._adapter_rows[i] for k, i in self._index_of.items()} == uses, "pins disagree with the rows"
        assert len(self._free_indices) + len(uses) == rows.num_rows, "adapter indices are lost"


def _line_key(sequence: Sequence) -> tuple[int, int]:
    return sequence.line_key
