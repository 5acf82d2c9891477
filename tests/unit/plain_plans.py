"""Lanes, workers and homes by small numbers, for tests of the policy."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

import msgspec

from medley.dispatcher.plans import Lane, Phase, Plan, Worker

HIGH, NORMAL, LOW = 2, 1, 0


def uid(number: int) -> UUID:
    return UUID(int=number)


def lane(
    number: int, tenant: int, num_queued: int, *, priority: int = NORMAL, est: float = 10, waited_s: float = 0
) -> Lane:
    return Lane(uid(number), uid(tenant), uid(number), priority, num_queued, est_tokens=est, waited_s=waited_s)


def replace_lane(of: Lane, **changes: float) -> Lane:
    return msgspec.structs.replace(of, **changes)


def base_lane(tenant: int, num_queued: int) -> Lane:
    return Lane(uid(tenant), uid(tenant), None, NORMAL, num_queued)


def active(number: int, *, rows: int = 8, leased: int = 0, rate: float = 0, tiles: int | None = None) -> Worker:
    return Worker(uid(number), Phase.ACTIVE, rows, leased, jobs_per_s=rate, num_tiles=tiles)


def homes(**lanes_at: tuple[int, ...]) -> dict[UUID, set[UUID]]:
    """homes(w1=(10, 11)): lanes 10 and 11 are at worker 1."""
    found: dict[UUID, set[UUID]] = {}
    for worker, lanes in lanes_at.items():
        for number in lanes:
            found.setdefault(uid(number), set()).add(uid(int(worker[1:])))
    return found


def taken(made: Plan, *, by: str = "worker") -> Counter[int]:
    found: Counter[int] = Counter()
    for assignment in made.assignments:
        found[getattr(assignment, by).int] += assignment.num_jobs
    return found
