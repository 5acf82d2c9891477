"""Which calls about the pool's size are due: level-triggered, plain data, no I/O.

Two kinds: more workers are wanted than there are, and workers have slept so long that they may be released. While
such a condition stands, a call about it is due: at once, again after a pause where it failed, and now and then where
it was heard, so that what a receiver lost comes again. Repeats have the first call's id, a changed condition another.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from medley.dispatcher.glance import Glance
from medley.spec.ids import WORKER, public_id, uuid7

WANTED, RELEASABLE = "workers.wanted", "workers.releasable"
MIN_GAP_S = 5.0  # between calls of a kind, however fast the condition changes
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 60.0
MAX_RELEASABLE = 100  # workers that one call names


@dataclass(frozen=True)
class Call:
    """One document. `body` is JSON-ready and holds id and type too."""

    id: str
    type: str
    body: dict[str, object]


@dataclass
class _Level:
    """A condition that stands: what it says, what was heard of it last, and how the calls about it went."""

    content: Hashable
    call: Call
    due_s: float
    num_failed: int = 0
    heard: Hashable = None


class ScaleCalls:
    """release_after_s: of sleep; repeat_s: between calls that were heard."""

    def __init__(self, *, release_after_s: float, repeat_s: float) -> None:
        self._release_after_s = release_after_s
        self._repeat_s = repeat_s
        self._levels: dict[str, _Level] = {}
        self._not_before_s: dict[str, float] = {}

    def see(self, glance: Glance, now: float) -> None:
        """Takes in how things stand."""
        wanted = glance.num_wanted if glance.num_wanted > glance.num_registered else None
        self._stand(WANTED, wanted, glance, now, lambda was: wanted is not None and wanted > was)
        slept = frozenset(row.id for row in glance.releasable(self._release_after_s)[:MAX_RELEASABLE]) or None
        self._stand(RELEASABLE, slept, glance, now, lambda was: slept is not None and not slept <= was)

    def forget(self) -> None:
        """Another leads: what stands is his to say."""
        self._levels.clear()

    def due(self, now: float) -> Call | None:
        """The next call to make, wanted workers first."""
        for kind in (WANTED, RELEASABLE):
            level = self._levels.get(kind)
            if level is not None and max(level.due_s, self._not_before_s.get(kind, level.due_s)) <= now:
                return level.call
        return None

    def made(self, call: Call, now: float, *, is_heard: bool) -> float:
        """How a call went. Returns the seconds until the next about it."""
        self._not_before_s[call.type] = now if not is_heard else now + MIN_GAP_S
        level = self._levels.get(call.type)
        if level is None or level.call.id != call.id:
            return 0.0  # it has changed meanwhile
        if is_heard:
            level.num_failed, level.heard, wait_s = 0, level.content, self._repeat_s
        else:
            wait_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2**level.num_failed) * random.uniform(0.8, 1.2)
            level.num_failed += 1
        level.due_s = now + wait_s
        return wait_s

    def _stand(self, kind: str, content: Any, glance: Glance, now: float, grows: Any) -> None:
        level = self._levels.get(kind)
        if content is None:
            self._levels.pop(kind, None)
        elif level is None:
            self._levels[kind] = _Level(content, self._call(kind, glance), now)
        elif content != level.content:
            # More than was heard is news at once; less is said when the next call would come anyway.
            is_news = level.heard is not None and level.num_failed == 0 and grows(level.heard)
            due_s = now if is_news else level.due_s
            self._levels[kind] = _Level(content, self._call(kind, glance), due_s, level.num_failed, level.heard)

    def _call(self, kind: str, glance: Glance) -> Call:
        identity = f"scale_{uuid7().hex}"
        body: dict[str, object] = {
            "id": identity,
            "type": kind,
            "pool": glance.pool,
            "term": glance.term,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "wanted": glance.num_wanted,
            "registered": glance.num_registered,
            "queued_jobs": glance.num_queued,
            "leased_jobs": glance.num_leased,
            "workers_by_state": dict(glance.states),
        }
        if kind == WANTED:
            body["missing"] = glance.num_wanted - glance.num_registered
        else:
            body["workers"] = [
                {
                    "id": public_id(WORKER, row.id),
                    "host": row.host,
                    "pid": row.pid,
                    "asleep_s": round(row.unchanged_s, 1),
                }
                for row in glance.releasable(self._release_after_s)[:MAX_RELEASABLE]
            ]
        return Call(identity, kind, body)
