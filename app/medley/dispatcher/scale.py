"""How many workers are active: who is woken, drained and put to sleep.

A worker is woken only when no active one has room for what waits, and only where those that are active or waking would
not begin it soon. When load falls, the emptiest are drained once the others could have carried their jobs for a while,
with some rows to spare: that, and one wave of drains at a time, is the hysteresis. A worker that an operator holds is
left where he wants it. It knows no tenants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from uuid import UUID

from medley.dispatcher.place import Fleet, Seat, capacity
from medley.dispatcher.plans import Phase, Rules, Worker


def count_spare(fleet: Fleet, workers: Sequence[Worker], usual_leased: float, rules: Rules) -> int:
    """How many of the emptiest active workers the others' rows could do without; one at the least stays.

    Held ones stay and are not among them. usual_leased: jobs that the pool's workers held lately, on the average; what
    is above it for a moment goes into backlogs.
    """
    if any(_is_coming(w, rules) for w in workers):
        return 0
    seats = _emptiest_first(fleet)
    wanted = usual_leased + rules.headroom * math.sqrt(usual_leased)
    rows = sum(seat.worker.max_num_seqs for seat in fleet.seats.values())
    is_any_held = len(seats) < len(fleet.seats)
    num_spare = 0
    for seat in seats if is_any_held else seats[:-1]:
        rows -= seat.worker.max_num_seqs
        if rows < wanted:
            break
        num_spare += 1
    return num_spare


def desires(
    fleet: Fleet,
    workers: Sequence[Worker],
    *,
    num_left: int,
    is_full: bool,
    usual_leased: float | None,
    rules: Rules,
) -> dict[UUID, Phase]:
    """The phases workers are to take.

    num_left: jobs that wait on; is_full: no active worker has room for them; usual_leased: see `count_spare`, None
    where it is not known or the fleet has changed since.
    """
    found = {w.id: Phase.ASLEEP for w in workers if w.phase is Phase.DRAINING and w.num_leased == 0} | _held(workers)
    if num_left > 0:
        return found | (_wake(fleet, workers, num_left, rules) if is_full else {})
    idle = [seat.worker for seat in _emptiest_first(fleet) if seat.num_leased == 0]
    for number, worker in enumerate(idle):
        is_last = number == len(fleet.seats) - 1
        if worker.idle_s >= (rules.idle_sleep_s if is_last else rules.drain_after_s):
            found[worker.id] = Phase.ASLEEP
    if usual_leased is not None and not any(w.phase is Phase.DRAINING for w in workers):
        num_spare = count_spare(fleet, workers, usual_leased, rules)
        limit = max(1, int(rules.drain_share * len(fleet.seats)))
        for seat in _emptiest_first(fleet)[: min(num_spare, limit)]:
            found[seat.worker.id] = Phase.DRAINING if seat.num_leased else Phase.ASLEEP
    return found


def count_wanted(workers: Sequence[Worker], num_waiting: int, rules: Rules) -> int:
    """How many workers the pool should have, be they there or not, so that all begins within `rules.scale_wait_s`.

    num_waiting: jobs that no worker holds. A worker takes its rows' number at once, and what it finishes in that time
    after them. While no rate is known no more are wanted than there are, or the one that will show it: a guess would
    start machines by the hundred.
    """
    num_jobs = num_waiting + sum(w.num_leased for w in workers)
    known = [w for w in workers if w.jobs_per_s > 0]
    if num_jobs == 0:
        return 0
    if not known:
        rows = [w.max_num_seqs for w in workers if w.hold is not Phase.ASLEEP and w.max_num_seqs > 0]
        return max(1, min(len(rows), math.ceil(num_jobs * len(rows) / max(1, sum(rows)))))
    each = sum(w.max_num_seqs + rules.scale_wait_s * w.jobs_per_s for w in known) / len(known)
    return math.ceil(num_jobs / each)


def _held(workers: Sequence[Worker]) -> dict[UUID, Phase]:
    """What holds still ask for: sleep of those that have run dry, and activity of those that sleep."""
    found: dict[UUID, Phase] = {}
    for worker in workers:
        if worker.hold is Phase.ASLEEP and (
            worker.phase is Phase.WAKING or (worker.phase is Phase.ACTIVE and worker.num_leased == 0)
        ):
            found[worker.id] = Phase.ASLEEP
        elif worker.hold is Phase.ACTIVE and worker.phase in (Phase.ASLEEP, Phase.DRAINING):
            found[worker.id] = Phase.ACTIVE
    return found


def _wake(fleet: Fleet, workers: Sequence[Worker], num_left: int, rules: Rules) -> dict[UUID, Phase]:
    """Those to wake: as many as what waits would fill, doubling the fleet at the most."""
    rates = [seat.worker.jobs_per_s for seat in fleet.seats.values()]
    if rates and all(rates) and num_left <= sum(rates) * rules.wake_wait_s:
        return {}
    awake = [w for w in workers if _is_coming(w, rules)]
    num_left -= sum(capacity(w, rules) for w in awake)
    limit = max(1, len(fleet.seats) + len(awake))
    found: dict[UUID, Phase] = {}
    for worker in sorted((w for w in workers if w.phase is Phase.ASLEEP and w.hold is None), key=lambda w: w.id):
        if num_left <= 0 or len(found) == limit:
            break
        found[worker.id] = Phase.ACTIVE
        num_left -= capacity(worker, rules)
    return found


def _is_coming(worker: Worker, rules: Rules) -> bool:
    """Whether it will be active soon, and take jobs."""
    is_waking = worker.phase is Phase.WAKING and worker.hold is not Phase.ASLEEP
    return is_waking and worker.unchanged_s <= rules.wake_patience_s


def _emptiest_first(fleet: Fleet) -> list[Seat]:
    """Those that may be told to sleep: nobody holds them."""
    free = (seat for seat in fleet.seats.values() if seat.worker.hold is None)
    return sorted(free, key=lambda seat: (seat.num_leased, seat.worker.id))
