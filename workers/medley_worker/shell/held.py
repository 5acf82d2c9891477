"""The table of held jobs: every job this worker has taken and not yet given an end, and where each stands.

Owns that state behind one lock; all threads of the shell share it. It decides nothing but who may enter the engine
(by the policy of `isolation`), does no I/O, and knows no text.

    WAITING -> IN_ENGINE -> ENDING -> (gone, once PostgreSQL has its result or release)
       ^            |
       +- engine died
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple
from uuid import UUID

from medley.spec.wire import AdapterRef, Batch, JobKey, WorkItem
from medley_worker.shell.isolation import Suspect, limit_after_death, next_round
from medley_worker.stops import StopWatch


class Phase(Enum):
    WAITING = "waiting"
    IN_ENGINE = "in engine"
    ENDING = "ending"


@dataclass(slots=True, eq=False)
class Held:
    """One job. `item` None: it ends without ever reaching the engine."""

    key: JobKey
    item: WorkItem | None = None
    step_limit: int | None = None  # a suspect: how many may share its step
    phase: Phase = Phase.WAITING
    is_running: bool = False  # named in a Running of the present engine
    is_releasing: bool = False  # the engine has been asked to give it back
    stops: StopWatch | None = None  # of the present engine's output; the engine link's thread alone uses it
    tenant: UUID | None = None  # None: it ends without ever reaching the engine

    @property
    def revision(self) -> UUID | None:
        return None if self.item is None or self.item.adapter is None else self.item.adapter.revision


class Share(NamedTuple):
    """Jobs of one tenant for one adapter revision (None: the base): in rows, and waiting for one."""

    tenant: UUID
    revision: UUID | None
    decoding: int
    prefilling: int
    waiting: int


class HeldJobs:
    """The table. Methods are short, atomic, and take and give lists."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[UUID, Held] = {}
        self._waiting: dict[UUID, Held] = {}
        self._suspects: dict[UUID, Held] = {}  # those that wait and have a step limit
        self._in_engine: dict[UUID, Held] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def num_in_engine(self) -> int:
        return len(self._in_engine)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting or self._suspects)

    def not_held(self, jobs: Iterable[UUID]) -> list[UUID]:
        with self._changed:
            return [job for job in jobs if job not in self._jobs]

    def adapter_paths(self) -> set[str]:
        """The folders of adapters that held jobs want."""
        with self._changed:
            return {h.item.adapter.path for h in self._jobs.values() if h.item is not None and h.item.adapter}

    def revisions(self) -> set[UUID]:
        """The adapter revisions of the jobs that are held."""
        with self._changed:
            return {held.revision for held in self._jobs.values() if held.revision is not None}

    def composition(self, batch: Batch) -> list[Share]:
        """Whose jobs are here, largest share first; `batch`: which of them the engine has in rows."""
        found: dict[tuple[UUID, UUID | None], list[int]] = {}
        decoding, prefilling = set(batch.decoding), set(batch.prefilling)
        with self._changed:
            for held in self._jobs.values():
                if held.phase is not Phase.ENDING and held.tenant is not None:
                    place = 0 if held.key in decoding else 1 if held.key in prefilling else 2
                    found.setdefault((held.tenant, held.revision), [0, 0, 0])[place] += 1
        shares = [Share(tenant, revision, *counts) for (tenant, revision), counts in found.items()]
        return sorted(shares, key=lambda s: (-(s.decoding + s.prefilling), -s.waiting, s.tenant.bytes, str(s.revision)))

    def hold(self, jobs: Iterable[Held]) -> list[Held]:
        """Take jobs in; a job that is held already is left out. Returns those that were taken."""
        taken = []
        with self._changed:
            for held in jobs:
                job = held.key.job
                if job not in self._jobs:
                    self._jobs[job] = held
                    if held.phase is Phase.WAITING:
                        self._wait(held)
                    taken.append(held)
        return taken

    def enter(self) -> tuple[list[WorkItem], tuple[AdapterRef, ...]]:
        """Move to the engine what may enter it now. Returns it, and the adapters of what has to wait, in order.

        Suspects run in rounds with nothing else: while there are any, the engine first empties.
        """
        with self._changed:
            if self._suspects:
                if self._in_engine:
                    return [], ()
                entering = self._round()
            elif self._in_round():
                return [], ()
            else:
                entering, self._waiting = list(self._waiting.values()), {}
            items = []
            for held in entering:
                assert held.item is not None
                held.phase = Phase.IN_ENGINE
                self._in_engine[held.key.job] = held
                items.append(held.item)
            return items, self._later()

    def later(self) -> tuple[AdapterRef, ...]:
        """The adapters of what waits to enter the engine, in order."""
        with self._changed:
            return self._later()

    def announce(self, keys: Iterable[JobKey]) -> None:
        """The engine has named these in a Running."""
        with self._changed:
            for key in keys:
                held = self._in_engine.get(key.job)
                if held is not None and held.key == key:
                    held.is_running = True

    def in_engine(self, key: JobKey) -> Held | None:
        held = self._in_engine.get(key.job)
        return held if held is not None and held.key == key else None

    def leave(self, keys: Sequence[JobKey]) -> list[Held | None]:
        """The engine is done with these: they are ENDING. None for each that was not in it, in order."""
        found: list[Held | None] = []
        with self._changed:
            for key in keys:
                held = self._in_engine.get(key.job)
                if held is not None and held.key == key:
                    self._end(held)
                    found.append(held)
                else:
                    found.append(None)
            if not self._in_engine:
                self._changed.notify_all()
        return found

    def end(self, key: JobKey) -> Phase | None:
        """Make a job ENDING wherever it stands, or even where it is not held. Returns where it stood.

        None: it is ending already, or another attempt of it is held; the caller has nothing to do.
        """
        with self._changed:
            held = self._jobs.get(key.job)
            if held is None:
                self._jobs[key.job] = Held(key, phase=Phase.ENDING)
                return Phase.WAITING
            if held.key != key or held.phase is Phase.ENDING:
                return None
            phase = held.phase
            self._end(held)
            if not self._in_engine:
                self._changed.notify_all()
            return phase

    def ask_release(self, key: JobKey) -> Phase | None:
        """A job is to be given back. WAITING: it is ENDING now. IN_ENGINE: ask the engine. None: nothing to do."""
        with self._changed:
            held = self._jobs.get(key.job)
            if held is None or held.key != key or held.phase is not Phase.IN_ENGINE:
                return self.end(key)  # the lock is reentrant
            if held.is_releasing:
                return None
            held.is_releasing = True
            return Phase.IN_ENGINE

    def end_waiting(self, which: Callable[[Held], bool] = lambda _: True) -> list[Held]:
        """Make those that wait ENDING. Returns them."""
        with self._changed:
            waiting = [h for h in (*self._waiting.values(), *self._suspects.values()) if which(h)]
            for held in waiting:
                self._end(held)
            return waiting

    def put_back(self, *, is_death: bool) -> list[JobKey]:
        """The engine is gone: what was in it waits again. After a death, what was in its step becomes suspect.

        Returns the suspects.
        """
        with self._changed:
            suspects = [held for held in self._in_engine.values() if held.is_running] if is_death else []
            for held in suspects:
                held.step_limit = limit_after_death(len(suspects))
            for held in self._in_engine.values():
                held.phase, held.is_running, held.is_releasing, held.stops = Phase.WAITING, False, False, None
                self._wait(held)
            self._in_engine = {}
            self._changed.notify_all()
            return [held.key for held in suspects]

    def drop(self, keys: Iterable[JobKey]) -> None:
        """PostgreSQL has these, or has refused them: forget them."""
        with self._changed:
            for key in keys:
                held = self._jobs.get(key.job)
                if held is not None and held.key == key:
                    assert held.phase is Phase.ENDING
                    del self._jobs[key.job]
            if not self._jobs:
                self._changed.notify_all()

    def wait_engine_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_engine, timeout_s)

    def wait_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def check_integrity(self) -> None:
        """Every job is in exactly the place that its phase names. For tests."""
        with self._changed:
            places = [*self._waiting.values(), *self._suspects.values(), *self._in_engine.values()]
            assert len(places) == len({held.key.job for held in places})
            assert all(self._jobs[held.key.job] is held for held in places)
            assert all(h.phase is Phase.WAITING and h.step_limit is None for h in self._waiting.values())
            assert all(h.phase is Phase.WAITING and h.step_limit is not None for h in self._suspects.values())
            assert all(h.phase is Phase.IN_ENGINE for h in self._in_engine.values())
            assert sum(h.phase is not Phase.ENDING for h in self._jobs.values()) == len(places)

    def _later(self) -> tuple[AdapterRef, ...]:
        later = (held.item.adapter for held in self._waiting.values() if held.item and held.item.adapter)
        return tuple({adapter.revision: adapter for adapter in later}.values())

    def _wait(self, held: Held) -> None:
        (self._waiting if held.step_limit is None else self._suspects)[held.key.job] = held

    def _end(self, held: Held) -> None:
        for place in (self._in_engine, self._waiting, self._suspects):
            place.pop(held.key.job, None)
        held.phase = Phase.ENDING

    def _in_round(self) -> bool:
        # A round shares the engine with nothing else, so any one job tells.
        first = next(iter(self._in_engine.values()), None)
        return first is not None and first.step_limit is not None

    def _round(self) -> list[Held]:
        suspects = [Suspect(h.key, h.revision, h.step_limit) for h in self._suspects.values() if h.step_limit]
        return [self._suspects.pop(key.job) for key in next_round(suspects)]
