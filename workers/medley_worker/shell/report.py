"""What the worker says of itself with each renewal: its state, its room, its engine's totals, whose jobs it runs.

Totals are the worker's: they go on over the engines that it starts one after another. Beside them stand rates over
the last seconds, so that who looks once sees how fast it is. Tenants and adapters are named by id, a bounded number
of them, and nothing of what their jobs say.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec

from medley.db.workers import Room, WorkerState
from medley.spec.wire import EngineStats
from medley_worker.shell.held import Share

# What an EngineStats counts since its engine started; the rest says how things stand.
TOTALS = (
    "steps",
    "step_s",
    "forward_s",
    "host_s",
    "rows",
    "adapters",
    "prompt_tokens",
    "generated_tokens",
    "preemptions",
    "adapter_loads",
    "adapter_evictions",
    "adapter_load_s",
)

RATE_S = 5.0  # over which rates are taken
MAX_SHARES = 32  # of (tenant, adapter) that a renewal names; the others are one sum


@dataclass(frozen=True)
class Said:
    """One renewal's content, JSON-ready; `stats` leaves `resident` out.

    batch: {"shares": [[tenant, revision or null, decoding, prefilling, waiting], ...], "others": the sums of those
    that are not named and their number, [decoding, prefilling, waiting, number]}.
    """

    state: WorkerState
    room: Room
    resident: tuple[UUID, ...]
    stats: dict[str, object]
    batch: dict[str, object]


class Report:
    """Written by whoever knows, read by the renewal."""

    def __init__(self, max_num_seqs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shares: Sequence[Share] = ()
        self._seen: deque[tuple[float, EngineStats]] = deque()  # totals of the last RATE_S and one older
        self._lock = threading.Lock()
        self._empty_room = Room(max_num_seqs)
        self._state = WorkerState.ASLEEP
        self._room = self._empty_room
        self._engine = EngineStats()
        self._before = EngineStats()  # totals of engines that have ended

    @property
    def state(self) -> WorkerState:
        return self._state

    def stands(self, state: WorkerState, room: Room | None = None) -> None:
        """The worker's state, and with it the room; None: no engine is loaded."""
        with self._lock:
            self._state = state
            self._room = self._empty_room if room is None else room

    def drains(self) -> None:
        """Draining keeps the room that it has."""
        with self._lock:
            self._state = WorkerState.DRAINING

    def engine_says(self, stats: EngineStats) -> None:
        with self._lock:
            self._engine = stats
            self._seen.append((self._clock(), self._sum()))
            while len(self._seen) > 2 and self._seen[1][0] <= self._seen[-1][0] - RATE_S:
                self._seen.popleft()

    def batch_is(self, shares: Sequence[Share]) -> None:
        """Whose jobs the batch is made of, largest share first."""
        self._shares = shares

    def engine_ended(self) -> None:
        """Its totals stay; nothing is resident any more."""
        with self._lock:
            self._before = self._sum()
            self._engine = EngineStats()
            self._shares = ()
            self._seen.clear()

    def said(self) -> Said:
        batch = _named(self._shares)
        with self._lock:
            stats = msgspec.structs.asdict(self._sum()) | self._rates()
            del stats["resident"]
            return Said(self._state, self._room, self._engine.resident, stats, batch)

    def _rates(self) -> dict[str, object]:
        """Of the seconds before the engine's last word; nothing where it has just begun, or fallen silent."""
        if len(self._seen) < 2 or self._clock() - self._seen[-1][0] > RATE_S:
            return {}
        (since, before), (until, now) = self._seen[0], self._seen[-1]
        steps, elapsed_s = now.steps - before.steps, until - since
        if elapsed_s <= 0:
            return {}
        rates: dict[str, object] = {
            "tokens_per_s": round((now.generated_tokens - before.generated_tokens) / elapsed_s, 1),
            "steps_per_s": round(steps / elapsed_s, 1),
        }
        if steps:
            rates["step_ms"] = round(1e3 * (now.step_s - before.step_s) / steps, 2)
            rates["rows_per_step"] = round((now.rows - before.rows) / steps, 1)
            rates["adapters_per_step"] = round((now.adapters - before.adapters) / steps, 1)
        return rates

    def _sum(self) -> EngineStats:
        totals = {name: getattr(self._before, name) + getattr(self._engine, name) for name in TOTALS}
        return msgspec.structs.replace(self._engine, **totals)


def _named(shares: Sequence[Share]) -> dict[str, object]:
    shown, others = shares[:MAX_SHARES], shares[MAX_SHARES:]
    return {
        "shares": [
            [s.tenant.hex, None if s.revision is None else s.revision.hex, s.decoding, s.prefilling, s.waiting]
            for s in shown
        ],
        "others": [
            sum(s.decoding for s in others),
            sum(s.prefilling for s in others),
            sum(s.waiting for s in others),
            len(others),
        ],
    }
