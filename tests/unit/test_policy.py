"""The dispatcher's policy on plain data."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from medley.dispatcher import policy
from medley.dispatcher.policy import Lane, Phase, Plan, Rules, Tenant, Worker, lift, plan
from medley.dispatcher.sightings import Sightings

HIGH, NORMAL, LOW = 2, 1, 0


def uid(number: int) -> UUID:
    return UUID(int=number)


def lane(
    number: int, tenant: int, num_queued: int, *, priority: int = NORMAL, est: float = 10, waited_s: float = 0
) -> Lane:
    return Lane(uid(number), uid(tenant), uid(number), priority, num_queued, est_tokens=est, waited_s=waited_s)


def base_lane(tenant: int, num_queued: int) -> Lane:
    return Lane(uid(tenant), uid(tenant), None, NORMAL, num_queued)


def active(number: int, *, rows: int = 8, leased: int = 0, lanes: tuple[int, ...] = (), rate: float = 0) -> Worker:
    held = frozenset(uid(n) for n in lanes)
    return Worker(uid(number), Phase.ACTIVE, rows, leased, held, jobs_per_s=rate)


def taken(made: Plan, *, by: str = "worker") -> Counter[int]:
    found: Counter[int] = Counter()
    for assignment in made.assignments:
        found[getattr(assignment, by).int] += assignment.num_jobs
    return found


def test_nothing_waits_nothing_is_planned() -> None:
    made = plan([], [], [active(1)])
    assert (made.assignments, made.desires, made.num_left) == ([], {}, 0)


def test_room_is_the_rows_and_a_backlog_as_large() -> None:
    made = plan([base_lane(1, 100)], [Tenant(uid(1), 0)], [active(9, rows=8, leased=3)])
    assert taken(made) == {9: 13}
    assert made.num_left == 87


def test_a_fast_worker_has_two_seconds_of_backlog() -> None:
    made = plan([base_lane(1, 5_000)], [Tenant(uid(1), 0)], [active(9, rows=8, rate=500)])
    assert taken(made) == {9: 1_008}


def test_a_plan_is_no_larger_than_a_second_of_writes() -> None:
    made = plan([base_lane(1, 50_000)], [Tenant(uid(1), 0)], [active(9, rate=9_000)], rules=Rules(max_jobs=100))
    assert taken(made) == {9: 100}
    assert made.look_in_s == 0


def test_the_least_served_tenant_comes_first() -> None:
    lanes = [lane(10, 1, 50), lane(20, 2, 50)]
    made = plan(lanes, [Tenant(uid(1), 1_000), Tenant(uid(2), 0)], [active(9, rows=8)])
    assert taken(made, by="lane") == {20: 16}


def test_one_plan_interleaves_tenants_by_what_they_are_charged() -> None:
    lanes = [lane(10, 1, 500, est=10), lane(20, 2, 500, est=30)]
    made = plan(lanes, [Tenant(uid(1), 0), Tenant(uid(2), 0)], [active(9, rows=64)])
    assert taken(made, by="lane") == {10: 96, 20: 32}
    assert {a.lane.int for a in made.assignments[:2]} == {10, 20}


def test_a_weight_of_three_is_served_three_times_as_much() -> None:
    lanes = [lane(10, 1, 500), lane(20, 2, 500)]
    made = plan(lanes, [Tenant(uid(1), 0, weight=3), Tenant(uid(2), 0)], [active(9, rows=64)])
    assert taken(made, by="lane") == {10: 96, 20: 32}


def test_a_higher_priority_comes_before_every_counter() -> None:
    lanes = [lane(10, 1, 10, priority=HIGH), lane(20, 2, 10), lane(30, 3, 10, priority=LOW)]
    tenants = [Tenant(uid(1), 1e9), Tenant(uid(2), 10), Tenant(uid(3), 0)]
    assert taken(plan(lanes, tenants, [active(9, rows=6)]), by="lane") == {10: 10, 20: 2}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_tenants_that_wait_throughout_differ_by_one_turn_at_the_most(seed: int) -> None:
    draw = random.Random(seed)
    rules = Rules()
    weights = {t: draw.choice([0.5, 1, 4]) for t in (1, 2, 3)}
    sizes = {t: draw.choice([5, 40, 300]) for t in weights}
    service = dict.fromkeys(weights, 0.0)
    bound = max(rules.max_turn * sizes[t] / weights[t] for t in weights)
    for _ in range(60):
        lanes = [lane(t * 10 + i, t, 1_000, est=sizes[t]) for t in weights for i in range(2)]
        tenants = [Tenant(uid(t), service[t], weights[t]) for t in weights]
        made = plan(lanes, tenants, [active(9, rows=draw.randrange(1, 40))], rules=rules)
        for number, num_jobs in taken(made, by="lane").items():
            tenant = number // 10
            service[tenant] += num_jobs * sizes[tenant] / weights[tenant]
        assert max(service.values()) - min(service.values()) <= bound


def test_who_returns_from_idle_is_lifted_to_the_least_of_those_that_waited() -> None:
    tenants = [
        Tenant(uid(1), 500, is_backlogged=True),
        Tenant(uid(2), 900, is_backlogged=True),
        Tenant(uid(3), 0, is_backlogged=False),
        Tenant(uid(4), 700, is_backlogged=False),
    ]
    assert lift(tenants, {uid(1), uid(2), uid(3), uid(4)}, 9_999) == {uid(3): 500, uid(4): 700}


def test_after_an_idle_time_all_begin_level() -> None:
    tenants = [Tenant(uid(1), 0, is_backlogged=False), Tenant(uid(2), 40, is_backlogged=False)]
    assert lift(tenants, {uid(1), uid(2)}, 40) == {uid(1): 40, uid(2): 40}


def test_a_job_goes_to_the_largest_working_set_with_a_free_row() -> None:
    workers = [active(1, leased=2), active(2, leased=5), active(3, leased=8)]
    assert taken(plan([base_lane(1, 3)], [Tenant(uid(1), 0)], workers)) == {2: 3}


def test_a_worker_that_has_the_adapter_is_preferred() -> None:
    workers = [active(1, leased=2, lanes=(10,)), active(2, leased=5)]
    assert taken(plan([lane(10, 1, 3)], [Tenant(uid(1), 0)], workers)) == {1: 3}


def test_a_free_row_elsewhere_beats_a_backlog_at_home() -> None:
    workers = [active(1, leased=8, lanes=(10,)), active(2, leased=0)]
    assert taken(plan([lane(10, 1, 3)], [Tenant(uid(1), 0)], workers)) == {2: 3}


def test_backlogs_grow_evenly_once_all_rows_are_taken() -> None:
    workers = [active(1, leased=8), active(2, leased=8), active(3, leased=8)]
    assert taken(plan([base_lane(1, 12)], [Tenant(uid(1), 0)], workers)) == {1: 4, 2: 4, 3: 4}


def test_lanes_that_are_resident_have_their_turn_first_and_then_the_longest() -> None:
    lanes = [lane(10, 1, 1), lane(11, 1, 2), lane(12, 1, 3)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, rows=4, lanes=(10,))])
    assert [a.lane.int for a in made.assignments[:3]] == [10, 12, 11]


def test_a_lane_that_was_passed_over_for_long_goes_first() -> None:
    lanes = [lane(10, 1, 100), lane(11, 1, 1, waited_s=31)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, lanes=(10,))])
    assert made.assignments[0].lane == uid(11)


def test_many_adapters_of_one_tenant_share_a_plan() -> None:
    lanes = [lane(10 + i, 1, 100) for i in range(32)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, rows=16)])
    assert len(taken(made, by="lane")) >= 16


def test_no_active_worker_wakes_one() -> None:
    workers = [Worker(uid(i), Phase.ASLEEP, 8) for i in (1, 2)]
    made = plan([base_lane(1, 3)], [Tenant(uid(1), 0)], workers)
    assert made.desires == {uid(1): Phase.ACTIVE}
    assert (made.assignments, made.num_left) == ([], 3)


def test_a_worker_is_woken_only_when_no_active_one_has_room() -> None:
    asleep = Worker(uid(2), Phase.ASLEEP, 8)
    tenants = [Tenant(uid(1), 0)]
    assert plan([base_lane(1, 16)], tenants, [active(1), asleep]).desires == {}
    assert plan([base_lane(1, 17)], tenants, [active(1), asleep]).desires == {uid(2): Phase.ACTIVE}


def test_no_second_worker_is_woken_while_the_first_will_have_room() -> None:
    workers = [Worker(uid(1), Phase.WAKING, 8), Worker(uid(2), Phase.ASLEEP, 8)]
    tenants = [Tenant(uid(1), 0)]
    assert plan([base_lane(1, 16)], tenants, workers).desires == {}
    assert plan([base_lane(1, 17)], tenants, workers).desires == {uid(2): Phase.ACTIVE}
    stuck = [replace(workers[0], unchanged_s=500), workers[1]]
    assert plan([base_lane(1, 1)], tenants, stuck).desires == {uid(2): Phase.ACTIVE}


def test_an_idle_worker_sleeps_after_a_while_and_not_while_jobs_wait() -> None:
    idle = replace(active(1), idle_s=31)
    assert plan([], [], [idle]).desires == {uid(1): Phase.ASLEEP}
    assert plan([], [], [replace(idle, idle_s=29)]).desires == {}
    assert plan([base_lane(1, 99)], [Tenant(uid(1), 0)], [idle]).desires == {}


def test_the_emptiest_worker_is_drained_once_the_others_could_have_carried_its_jobs() -> None:
    workers = [active(1, leased=4), active(2, leased=2)]
    assert plan([], [], workers).is_spare
    assert plan([], [], workers, spare_s=9).desires == {}
    assert plan([], [], workers, spare_s=10).desires == {uid(2): Phase.DRAINING}
    assert not plan([], [], [active(1, leased=5), active(2, leased=3)], spare_s=99).is_spare


def test_one_worker_is_drained_at_a_time_and_then_sleeps() -> None:
    draining = Worker(uid(3), Phase.DRAINING, 8, num_leased=1)
    workers = [active(1, leased=2), active(2, leased=1), draining]
    assert plan([], [], workers, spare_s=99).desires == {}
    assert plan([], [], [replace(draining, num_leased=0)]).desires == {uid(3): Phase.ASLEEP}


def test_while_jobs_wait_the_next_look_comes_before_a_backlog_ends() -> None:
    tenants = [Tenant(uid(1), 0)]
    full = active(1, leased=108, rate=50)
    assert plan([base_lane(1, 9)], tenants, [full]).look_in_s == 0.5
    assert plan([base_lane(1, 9)], tenants, [active(1, leased=16)]).look_in_s == policy.Rules().min_look_s


def test_a_rate_is_what_a_worker_was_given_less_what_it_holds() -> None:
    seen, worker = Sightings(), uid(1)
    seen.see_workers({worker: 0}, 0.0)
    seen.see_claims(worker, [(uid(5), 20)] * 100, 0.5)
    seen.see_workers({worker: 40}, 1.0)
    assert seen.jobs_per_s(worker) == 60
    assert seen.idle_s(worker, 1.0) == 0
    seen.see_workers({worker: 0}, 2.0)
    assert seen.jobs_per_s(worker) == 40
    assert seen.idle_s(worker, 5.0) == 3


def test_a_lane_waits_from_its_last_claim_on() -> None:
    seen, worker = Sightings(), uid(1)
    seen.see_workers({worker: 0}, 0.0)
    seen.see_lanes([uid(5)], 1.0)
    assert seen.waited_s(uid(5), 4.0) == 3
    seen.see_claims(worker, [(uid(5), 20), (uid(5), 40)], 4.0)
    assert seen.waited_s(uid(5), 6.0) == 2
    assert seen.job_tokens(uid(5)) == 30


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_plan_never_exceeds_jobs_or_room(data: st.DataObject) -> None:
    lanes = [
        lane(10 + i, 1 + i % 3, data.draw(st.integers(0, 40)), priority=data.draw(st.integers(0, 2))) for i in range(6)
    ]
    workers = [
        active(100 + i, rows=data.draw(st.integers(1, 9)), leased=data.draw(st.integers(0, 25)), lanes=(10 + i,))
        for i in range(3)
    ]
    made = plan(lanes, [Tenant(uid(t), 0) for t in (1, 2, 3)], workers)
    for number, num_jobs in taken(made, by="lane").items():
        assert num_jobs <= lanes[number - 10].num_queued
    room = {w.id.int: max(0, 2 * w.max_num_seqs - w.num_leased) for w in workers}
    given_to = taken(made)
    assert all(num_jobs <= room[worker] for worker, num_jobs in given_to.items())
    assert given_to.total() == min(sum(room.values()), sum(ln.num_queued for ln in lanes))
    assert made.num_left == sum(ln.num_queued for ln in lanes) - given_to.total()
