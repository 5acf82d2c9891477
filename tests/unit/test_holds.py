"""Workers that an operator holds: the policy works around them."""

from __future__ import annotations

import msgspec
from plain_plans import active, base_lane, lane, taken, uid

from medley.dispatcher.place import Fleet
from medley.dispatcher.plans import Phase, Rules, Tenant, Worker
from medley.dispatcher.policy import plan
from medley.dispatcher.scale import count_spare, count_wanted

RULES = Rules()
TENANT = [Tenant(uid(1), 0)]


def held(worker: Worker, hold: Phase) -> Worker:
    return msgspec.structs.replace(worker, hold=hold)


def asleep(number: int) -> Worker:
    return Worker(uid(number), Phase.ASLEEP, 8)


def test_a_worker_put_to_sleep_by_hand_is_not_woken_whatever_waits() -> None:
    waiting = [base_lane(1, 1_000)]
    assert plan(waiting, TENANT, [held(asleep(5), Phase.ASLEEP)]).desires == {}
    both = [held(asleep(5), Phase.ASLEEP), asleep(6)]
    assert plan(waiting, TENANT, both).desires == {uid(6): Phase.ACTIVE}


def test_a_worker_that_is_to_sleep_gets_no_more_jobs_and_sleeps_once_it_has_none() -> None:
    waiting = [base_lane(1, 10)]
    leaving = held(active(5, leased=3), Phase.ASLEEP)
    made = plan(waiting, TENANT, [leaving, active(6)])
    assert set(taken(made)) == {6}
    assert made.desires == {}
    empty = msgspec.structs.replace(leaving, num_leased=0)
    assert plan(waiting, TENANT, [empty, active(6)]).desires == {uid(5): Phase.ASLEEP}


def test_a_worker_that_is_woken_by_hand_is_neither_drained_nor_put_to_sleep() -> None:
    idle = msgspec.structs.replace(held(active(5), Phase.ACTIVE), idle_s=9_999.0)
    other = msgspec.structs.replace(active(6), idle_s=9_999.0)
    assert plan([], [], [idle, other], usual_leased=0.0).desires == {uid(6): Phase.ASLEEP}
    assert plan([], [], [held(asleep(5), Phase.ACTIVE)]).desires == {uid(5): Phase.ACTIVE}


def test_what_a_held_worker_carries_counts_when_others_are_drained() -> None:
    """With one that stays by hand, the last of the others may go too."""
    workers = [held(active(5, rows=8, leased=1), Phase.ACTIVE), active(6, rows=8, leased=1)]
    assert count_spare(Fleet(workers, {}, RULES), workers, 2.0, RULES) == 1
    assert count_spare(Fleet([workers[1]], {}, RULES), [workers[1]], 1.0, RULES) == 0


def test_a_waking_worker_that_is_to_sleep_is_not_waited_for() -> None:
    waking = Worker(uid(5), Phase.WAKING, 8, hold=Phase.ASLEEP)
    made = plan([base_lane(1, 8)], TENANT, [waking, asleep(6)])
    assert made.desires == {uid(5): Phase.ASLEEP, uid(6): Phase.ACTIVE}


def test_as_many_workers_are_wanted_as_begin_all_in_time() -> None:
    rules = Rules(scale_wait_s=30)
    busy = active(5, rows=8, leased=8, rate=2)  # 8 at once, 60 more within the time
    assert count_wanted([busy], 0, rules) == 1
    assert count_wanted([busy], 60, rules) == 1
    assert count_wanted([busy], 61, rules) == 2
    assert count_wanted([busy, asleep(6)], 600, rules) == 9
    assert count_wanted([asleep(6)], 0, rules) == 0


def test_while_no_rate_is_known_no_more_workers_are_wanted_than_there_are() -> None:
    assert count_wanted([], 5_000, RULES) == 1, "the one that will show it"
    assert count_wanted([asleep(5), asleep(6), asleep(7)], 5_000, RULES) == 3
    assert count_wanted([asleep(5), asleep(6), asleep(7)], 9, RULES) == 2
    assert count_wanted([asleep(5), held(asleep(6), Phase.ASLEEP)], 5_000, RULES) == 1


def test_a_plan_says_how_many_workers_it_wants() -> None:
    assert plan([lane(10, 1, 1_000)], TENANT, [active(9, rows=8, rate=1)]).num_wanted == 27
