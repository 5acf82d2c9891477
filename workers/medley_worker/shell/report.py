"""What the worker says of itself with each renewal: its state, its room, its engine's totals.

Totals are the worker's: they go on over the engines that it starts one after another.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from uuid import UUID

import msgspec

from medley.db.workers import Room, WorkerState
from medley.spec.wire import EngineStats

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


@dataclass(frozen=True)
class Said:
    """One renewal's content; `stats` is JSON-ready and leaves `resident` out."""

    state: WorkerState
    room: Room
    resident: tuple[UUID, ...]
    stats: dict[str, object]


class Report:
    """Written by whoever knows, read by the renewal."""

    def __init__(self, max_num_seqs: int) -> None:
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

    def engine_ended(self) -> None:
        """Its totals stay; nothing is resident any more."""
        with self._lock:
            self._before = self._sum()
            self._engine = EngineStats()

    def said(self) -> Said:
        with self._lock:
            stats = msgspec.structs.asdict(self._sum())
            del stats["resident"]
            return Said(self._state, self._room, self._engine.resident, stats)

    def _sum(self) -> EngineStats:
        totals = {name: getattr(self._before, name) + getattr(self._engine, name) for name in TOTALS}
        return msgspec.structs.replace(self._engine, **totals)
