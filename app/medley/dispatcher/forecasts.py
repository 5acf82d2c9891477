"""When open batches will be done, and which deadlines can be kept only by going first: pure functions of plain data.

Both see the fleet as one fluid: so many jobs a second, shared by weight among the tenants of a class, the oldest batch
of a tenant first. They know no lanes, rows or adapters: an estimate, which is made anew every few seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from uuid import UUID

import msgspec

SLACK = 1.25  # a batch goes first while it still has this many times the time that it takes at the fleet's whole rate,
SLACK_S = 15.0  # and this much beside
MAX_FORECAST_S = 366 * 86_400.0  # beyond it nothing is known: the rate is next to nothing
BLIND_S = 60.0  # while the fleet's rate is unknown: within this time of its deadline


class OpenBatch(msgspec.Struct, frozen=True, gc=False):
    """A batch that is not done. due_s: seconds to its deadline; ids grow with time."""

    id: UUID
    tenant: UUID
    weight: float
    priority: int
    num_left: int
    due_s: float | None = None


class Forecast(msgspec.Struct, frozen=True, gc=False):
    batch: UUID
    ends_in_s: float
    is_late: bool  # after its deadline


@dataclass(frozen=True)
class Verdict:
    """hasten: batches whose deadlines can be kept if they go first, from now on. hopeless: those that cannot."""

    hasten: list[UUID]
    hopeless: list[UUID]


def forecast(batches: Sequence[OpenBatch], jobs_per_s: float) -> list[Forecast]:
    """When each batch will be done, classes one after another; [] while the rate is unknown.

    In a class tenant i with work W(i) and weight w(i) has had min(W(i), v w(i)) when everybody has had v times its
    weight, so that moment is the sum of these over the rate; a batch is done when v w(i) is the work up to its end.
    """
    if jobs_per_s <= 0:
        return []
    found: list[Forecast] = []
    before = 0.0  # jobs of the classes above
    by_class: dict[int, list[OpenBatch]] = defaultdict(list)
    for batch in batches:
        by_class[batch.priority].append(batch)
    for _, members in sorted(by_class.items(), reverse=True):
        ends: list[tuple[OpenBatch, float]] = []  # and v at its end
        work: dict[UUID, float] = defaultdict(float)
        weights = {batch.tenant: batch.weight for batch in members}
        for batch in sorted(members, key=lambda batch: batch.id):
            work[batch.tenant] += batch.num_left
            ends.append((batch, work[batch.tenant] / batch.weight))
        # Tenants by v at the end of all their work: those below a v have had all of it, the others v times a weight.
        order = sorted(work, key=lambda tenant: work[tenant] / weights[tenant])
        tops = [work[tenant] / weights[tenant] for tenant in order]
        done = [0.0, *accumulate(work[tenant] for tenant in order)]
        sharing = [0.0, *accumulate(weights[tenant] for tenant in order)]
        for batch, v in ends:
            num_done = bisect_left(tops, v)
            jobs = before + done[num_done] + v * (sharing[-1] - sharing[num_done])
            ends_in_s = jobs / jobs_per_s
            if ends_in_s <= MAX_FORECAST_S:
                found.append(Forecast(batch.id, ends_in_s, batch.due_s is not None and ends_in_s > batch.due_s))
        before += done[-1]
    return found


def judge(batches: Sequence[OpenBatch], jobs_per_s: float, top_class: int) -> Verdict:
    """Which deadlines need help now, earliest first.

    A batch that would be late even if it, and those with earlier deadlines that can be kept, had the whole fleet is
    hopeless: to put it first would only make others late. Any other is left to its turn until the time that it
    needs so, with some slack, is all that it has.
    """
    dues = sorted((batch.due_s, batch.id, batch) for batch in batches if batch.due_s is not None)
    verdict = Verdict([], [])
    ahead = 0
    for due_s, _, batch in dues:
        if jobs_per_s <= 0:
            if due_s <= BLIND_S and batch.priority < top_class:
                verdict.hasten.append(batch.id)
            continue
        needed_s = (ahead + batch.num_left) / jobs_per_s
        if needed_s > due_s:
            verdict.hopeless.append(batch.id)
            continue
        ahead += batch.num_left
        if needed_s * SLACK + SLACK_S >= due_s and batch.priority < top_class:
            verdict.hasten.append(batch.id)
    return verdict
