"""What the fleet benchmark sees of the fleet: a look at the database many times a second, on a thread of its own.

It reads what `medley fleet` reads, and which checkpoints hold tokens. Times are POSIX seconds on the database's clock.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from medley.db import fleet as fleet_db
from medley.db.connections import transaction
from medley.db.fleet import Steer
from medley.rings import Ringer

LOOK_S = 0.05  # what times of waking are exact to

_WORKERS = text(
    "SELECT extract(epoch FROM clock_timestamp())::float8 AS now, id, state, desired_state, stats,"
    " extract(epoch FROM changed_at)::float8 AS changed FROM workers WHERE state <> 'gone' ORDER BY id"
)
_QUEUED = text("SELECT coalesce(sum(num_queued), 0)::int8 FROM demand")
_KEPT = text("SELECT job_id FROM checkpoints WHERE cardinality(token_ids) > 0")


@dataclass
class Seen:
    """How one worker stood over time."""

    states: list[tuple[float, str]] = field(default_factory=list)  # (s, state), where it changed
    totals: list[tuple[float, int, int, int]] = field(default_factory=list)  # (s, steps, rows, generated tokens)
    loads: list[tuple[float, int]] = field(default_factory=list)  # (s, adapters loaded so far), where it changed
    woken_at: float | None = None  # the word to wake, while it is waking

    def rows_per_step(self, since: float, until: float) -> float:
        """Between the reports around two times; 0 where it took no step."""
        (steps, rows, _), (more_steps, more_rows, _) = self._at(since), self._at(until)
        return (more_rows - rows) / (more_steps - steps) if more_steps > steps else 0.0

    def tokens(self, since: float, until: float) -> int:
        """Generated between the reports around two times."""
        return self._at(until)[2] - self._at(since)[2]

    def loaded_since(self, since: float) -> bool:
        """Whether the worker has told of loads of adapters since then."""
        return bool(self.loads) and self.loads[-1][0] >= since

    def _at(self, when: float) -> tuple[int, int, int]:
        """The totals of the newest report that is not later; a report tells of up to a quarter of a lease before."""
        place = bisect.bisect_right(self.totals, when, key=lambda total: total[0])
        return self.totals[place - 1][1:] if place else (0, 0, 0)


class Watch:
    """Looks from `__enter__` to `__exit__`. `workers` is in the order of their ids."""

    def __init__(self, engine: Engine, redis_url: str) -> None:
        """engine: as medley_owner."""
        self._engine, self._redis_url = engine, redis_url
        self.workers: dict[UUID, Seen] = defaultdict(Seen)
        self.wakes: list[float] = []  # seconds from the word to wake to active
        self.queued: list[tuple[float, int]] = []
        self.kept: dict[UUID, float] = {}  # jobs that left a worker with tokens: when that was first seen
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ends.set()
        self._thread.join()

    @property
    def now(self) -> float:
        """The database's time."""
        with transaction(self._engine) as conn:
            return float(conn.execute(text("SELECT extract(epoch FROM clock_timestamp())::float8")).scalar_one())

    def num_awake(self) -> int:
        """Workers that are not asleep, now."""
        self._raise()
        return sum(seen.states[-1][1] != "asleep" for seen in self.workers.values())

    def num_active(self) -> int:
        """Workers that take jobs, now."""
        self._raise()
        return sum(seen.states[-1][1] == "active" for seen in self.workers.values())

    def is_asleep(self, worker: UUID) -> bool:
        self._raise()
        return self.workers[worker].states[-1][1] == "asleep"

    def busiest(self) -> UUID:
        """The worker that holds most jobs, now."""
        with transaction(self._engine) as conn:
            worker: UUID = max(fleet_db.read_fleet(conn, None), key=lambda row: row.num_leased).id
        return worker

    def num_queued(self, when: float) -> int:
        """Jobs that waited."""
        place = bisect.bisect_right(self.queued, when, key=lambda queued: queued[0])
        return self.queued[place - 1][1] if place else 0

    def awake(self, since: float, until: float) -> list[tuple[float, int]]:
        """(s, workers that are not asleep) at `since` and wherever that changes, before `until`."""
        moments = sorted({since, *(at for w in self.workers.values() for at, _ in w.states if since < at < until)})
        counted = [(at, sum(_state_at(seen, at) != "asleep" for seen in self.workers.values())) for at in moments]
        return [now for before, now in zip([(0.0, -1), *counted], counted, strict=False) if now[1] != before[1]]

    def steer(self, workers: list[UUID], how: Steer) -> None:
        """As an operator does with `medley fleet`."""
        with self._engine.begin() as conn:
            for worker in workers:
                fleet_db.steer(conn, worker, how, "benchmark")
        ringer = Ringer(self._redis_url)
        for worker in workers:
            ringer.tell_worker(worker)
        ringer.close()

    def _run(self) -> None:
        try:
            while not self._ends.wait(LOOK_S):
                self._look()
        except BaseException as error:
            self._failure = error

    def _raise(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the watch over the fleet has failed") from self._failure

    def _look(self) -> None:
        with transaction(self._engine) as conn:
            rows = conn.execute(_WORKERS).all()
            for row in rows:
                self._see(row)
            self._count(conn, rows[0].now if rows else time.time())

    def _see(self, row: Any) -> None:
        seen = self.workers[row.id]
        if not seen.states or seen.states[-1][1] != row.state:
            seen.states.append((row.changed if seen.states else 0.0, row.state))
        if row.state == "active" and seen.woken_at is not None:
            self.wakes.append(row.changed - seen.woken_at)
            seen.woken_at = None
        elif row.desired_state == "active" and row.state in ("asleep", "waking") and seen.woken_at is None:
            seen.woken_at = row.changed  # of the word, or of the worker's first answer to it
        elif row.desired_state != "active":
            seen.woken_at = None
        total = (row.stats.get("steps", 0), row.stats.get("rows", 0), row.stats.get("generated_tokens", 0))
        if not seen.totals or seen.totals[-1][1:] != total:
            seen.totals.append((row.now, *total))
        num_loads = row.stats.get("adapter_loads", 0)
        if not seen.loads or seen.loads[-1][1] != num_loads:
            seen.loads.append((row.now, num_loads))

    def _count(self, conn: Connection, now: float) -> None:
        num_queued = int(conn.execute(_QUEUED).scalar_one())
        if not self.queued or self.queued[-1][1] != num_queued:
            self.queued.append((now, num_queued))
        for job in conn.execute(_KEPT).scalars():
            self.kept.setdefault(job, now)


def _state_at(seen: Seen, when: float) -> str:
    place = bisect.bisect_right(seen.states, when, key=lambda state: state[0])
    return seen.states[place - 1][1]
