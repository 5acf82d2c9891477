"""The dispatcher's policy on plain data."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_plans import HIGH, LOW, active, base_lane, homes, lane, replace_lane, taken, uid

from medley.dispatcher.pick import lift
from medley.dispatcher.planner import rows_that_fit
from medley.dispatcher.plans import Phase, Rules, Tenant, Worker
from medley.dispatcher.policy import plan
from medley.dispatcher.sightings import Sightings


def test_nothing_waits_nothing_is_planned() -> None:
    made = plan([], [], [active(1)])
    assert (made.assignments, made.desires, made.num_left) == ([], {}, 0)


def test_room_is_the_rows_and_a_backlog_as_large() -> None:
    made = plan([base_lane(1, 100)], [Tenant(uid(1), 0)], [active(9, rows=8, leased=3)])
    assert taken(made) == {9: 13}
    assert made.num_left == 87


def test_a_worker_whose_rate_is_known_has_a_second_of_backlog() -> None:
    made = plan([base_lane(1, 5_000)], [Tenant(uid(1), 0)], [active(9, rows=8, rate=500)])
    assert taken(made) == {9: 508}


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
    workers = [active(1, leased=2), active(2, leased=5)]
    assert taken(plan([lane(10, 1, 3)], [Tenant(uid(1), 0)], workers, homes(w1=(10,)))) == {1: 3}


def test_a_free_row_elsewhere_beats_a_backlog_at_home() -> None:
    workers = [active(1, leased=8), active(2, leased=0)]
    assert taken(plan([lane(10, 1, 3)], [Tenant(uid(1), 0)], workers, homes(w1=(10,)))) == {2: 3}


def test_backlogs_grow_evenly_once_all_rows_are_taken() -> None:
    workers = [active(1, leased=8), active(2, leased=8), active(3, leased=8)]
    assert taken(plan([base_lane(1, 12)], [Tenant(uid(1), 0)], workers)) == {1: 4, 2: 4, 3: 4}


def test_lanes_that_are_resident_have_their_turn_first_and_then_the_longest() -> None:
    lanes = [lane(10, 1, 1), lane(11, 1, 2), lane(12, 1, 3)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, rows=4)], homes(w9=(10,)))
    assert list(dict.fromkeys(a.lane.int for a in made.assignments)) == [10, 12, 11]


def test_a_lane_that_was_passed_over_for_long_goes_first() -> None:
    lanes = [lane(10, 1, 100), lane(11, 1, 1, waited_s=31)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9)], homes(w9=(10,)))
    assert made.assignments[0].lane == uid(11)


def test_many_short_lanes_of_one_tenant_share_a_plan() -> None:
    lanes = [lane(10 + i, 1, 2) for i in range(32)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, rows=16)])
    assert len(taken(made, by="lane")) == 16


def test_a_tenants_adapters_are_served_one_after_another() -> None:
    lanes = [lane(10 + i, 1, 100) for i in range(32)]
    made = plan(lanes, [Tenant(uid(1), 0)], [active(9, rows=16)], homes(w9=(40, 41)))
    assert set(taken(made, by="lane")) == {40, 41}


def test_an_adapter_is_loaded_again_for_several_jobs_or_for_the_last() -> None:
    workers = [active(1, leased=16), active(2, leased=11)]
    at_home, tenants = homes(w1=(10,)), [Tenant(uid(1), 0)]
    assert taken(plan([lane(10, 1, 20)], tenants, workers, at_home)) == {}
    assert taken(plan([lane(10, 1, 3)], tenants, workers, at_home)) == {2: 3}
    assert taken(plan([lane(10, 1, 20)], tenants, workers)) == {2: 5}


def test_room_for_adapters_is_tiles_too() -> None:
    heavy = replace_lane(lane(10, 1, 3), num_tiles=4)
    full = Worker(uid(1), Phase.ACTIVE, 8, 5, num_tiles=8, tiles_leased=6)
    tenants = [Tenant(uid(1), 0)]
    assert taken(plan([heavy], tenants, [full, active(2, tiles=8)])) == {2: 3}
    assert taken(plan([heavy], tenants, [full], homes(w1=(10,)))) == {1: 3}
    asleep = Worker(uid(3), Phase.ASLEEP, 8)
    assert plan([heavy], tenants, [full, asleep]).desires == {uid(3): Phase.ACTIVE}


def test_an_adapter_that_fits_no_worker_goes_to_one_that_says_so() -> None:
    giant = replace_lane(lane(10, 1, 3), num_tiles=400)
    busy = Worker(uid(1), Phase.ACTIVE, 8, 5, num_tiles=8, tiles_leased=1)
    assert taken(plan([giant], [Tenant(uid(1), 0)], [busy, active(2, tiles=8)])) == {2: 3}


def test_rows_are_no_more_than_pages_hold() -> None:
    assert rows_that_fit(64, {"num_running": 40, "pages_used": 1_000, "num_pages": 1_050}) == 42
    assert rows_that_fit(64, {"num_running": 40, "pages_used": 100, "num_pages": 1_050}) == 64
    assert rows_that_fit(64, {"num_running": 2, "pages_used": 1_000, "num_pages": 1_050}) == 64
    assert rows_that_fit(64, {}) == 64


def test_a_load_is_charged_to_the_tenant_that_causes_it() -> None:
    lanes = [replace_lane(lane(10, 1, 64), load_tokens=85.0), lane(20, 2, 64)]
    made = plan(lanes, [Tenant(uid(1), 0), Tenant(uid(2), 0)], [active(9, rows=16)], rules=Rules(max_turn=1))
    assert made.assignments[0].load_tokens == 85.0
    assert sum(a.load_tokens for a in made.assignments) == 85.0
    served = taken(made, by="lane")
    assert served[20] - served[10] == 85 // 10


def test_workers_hear_first_of_what_they_have_and_share_the_rest() -> None:
    workers = [active(1, leased=16), active(2, leased=16), Worker(uid(3), Phase.ASLEEP, 8)]
    lanes = [lane(10 + i, 1, 40 - i) for i in range(5)]
    made = plan(lanes, [Tenant(uid(1), 0)], workers, homes(w2=(13,)), rules=Rules(num_upcoming=2))
    assert made.upcoming == {uid(1): [uid(10), uid(12)], uid(2): [uid(11), uid(13)]}
    assert plan([], [], workers).upcoming == {uid(1): [], uid(2): []}


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
    stuck = [msgspec.structs.replace(workers[0], unchanged_s=500), workers[1]]
    assert plan([base_lane(1, 1)], tenants, stuck).desires == {uid(2): Phase.ACTIVE}


def test_a_short_wait_wakes_nobody() -> None:
    tenants, asleep = [Tenant(uid(1), 0)], Worker(uid(2), Phase.ASLEEP, 8)
    full = active(1, leased=108, rate=100)
    assert plan([base_lane(1, 25)], tenants, [full, asleep]).desires == {}
    assert plan([base_lane(1, 26)], tenants, [full, asleep]).desires == {uid(2): Phase.ACTIVE}


def test_a_deep_queue_doubles_the_fleet_at_the_most() -> None:
    workers = [active(1, leased=16), active(2, leased=16), *(Worker(uid(i), Phase.ASLEEP, 8) for i in range(3, 9))]
    assert len(plan([base_lane(1, 10_000)], [Tenant(uid(1), 0)], workers).desires) == 2


def test_an_idle_worker_sleeps_after_a_while_and_not_while_jobs_wait() -> None:
    idle = msgspec.structs.replace(active(1), idle_s=31)
    assert plan([], [], [idle]).desires == {uid(1): Phase.ASLEEP}
    assert plan([], [], [msgspec.structs.replace(idle, idle_s=29)]).desires == {}
    assert plan([base_lane(1, 99)], [Tenant(uid(1), 0)], [idle]).desires == {}


def test_an_idle_worker_sleeps_sooner_where_another_is_active() -> None:
    idle = msgspec.structs.replace(active(1), idle_s=10)
    assert plan([], [], [idle, active(2, leased=1)]).desires == {uid(1): Phase.ASLEEP}
    assert plan([], [], [idle, msgspec.structs.replace(active(2), idle_s=10)]).desires == {uid(1): Phase.ASLEEP}


def test_the_emptiest_worker_is_drained_once_the_others_could_have_carried_its_jobs() -> None:
    workers = [active(1, leased=4), active(2, leased=2)]
    assert plan([], [], workers).desires == {}
    assert plan([], [], workers, usual_leased=6).desires == {uid(2): Phase.DRAINING}
    assert plan([], [], workers, usual_leased=7).desires == {}
    assert plan([], [], [*workers, Worker(uid(3), Phase.WAKING, 8)], usual_leased=6).desires == {}


def test_one_wave_of_workers_is_drained_at_a_time_and_then_sleeps() -> None:
    draining = Worker(uid(9), Phase.DRAINING, 8, num_leased=1)
    workers = [active(i, leased=1) for i in range(1, 9)]
    assert plan([], [], workers, usual_leased=8).desires == {uid(1): Phase.DRAINING, uid(2): Phase.DRAINING}
    assert plan([], [], [*workers, draining], usual_leased=8).desires == {}
    emptied = msgspec.structs.replace(draining, num_leased=0)
    assert plan([], [], [*workers, emptied]).desires == {uid(9): Phase.ASLEEP}


def test_a_load_is_usual_once_as_many_workers_have_been_active_for_a_while() -> None:
    seen = Sightings()
    for second in range(31):
        seen.see_load(2, 40, float(second), 10.0)
    assert seen.usual_leased(30.0, 10.0) == pytest.approx(40, rel=0.06)
    seen.see_load(1, 40, 31.0, 10.0)
    assert seen.usual_leased(31.0, 10.0) is None
    assert seen.usual_leased(41.0, 10.0) is not None


def test_while_jobs_wait_the_next_look_comes_before_a_backlog_ends() -> None:
    tenants = [Tenant(uid(1), 0)]
    full = active(1, leased=58, rate=50)
    assert plan([base_lane(1, 9)], tenants, [full]).look_in_s == 0.25
    assert plan([base_lane(1, 9)], tenants, [active(1, leased=16)]).look_in_s == Rules().min_look_s


def test_a_rate_is_what_a_worker_was_given_less_what_it_holds() -> None:
    seen, worker = Sightings(), uid(1)
    seen.see_workers({worker: 0}, 0.0)
    seen.see_claim(worker, uid(5), 100, 2_000, 0.5)
    seen.see_workers({worker: 40}, 1.0)
    assert seen.jobs_per_s(worker) == 60
    assert seen.idle_s(worker, 1.0) == 0
    seen.see_workers({worker: 0}, 2.0)
    assert seen.jobs_per_s(worker) == 40
    assert seen.idle_s(worker, 5.0) == 3


def test_a_worker_whose_jobs_come_and_go_between_two_looks_is_not_idle() -> None:
    seen, worker = Sightings(), uid(1)
    seen.see_workers({worker: 0}, 0.0)
    assert seen.idle_s(worker, 60.0) == 60
    seen.see_claim(worker, uid(5), 1, 20, 60.0)
    seen.see_workers({worker: 0}, 61.0)
    assert seen.idle_s(worker, 63.0) == 2


def test_a_lane_waits_from_its_last_claim_on() -> None:
    seen, worker = Sightings(), uid(1)
    seen.see_workers({worker: 0}, 0.0)
    seen.see_lanes([uid(5)], 1.0)
    assert seen.waited_s(uid(5), 4.0) == 3
    seen.see_claim(worker, uid(5), 2, 60, 4.0)
    assert seen.waited_s(uid(5), 6.0) == 2
    assert seen.job_tokens(uid(5)) == 30


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_plan_never_exceeds_jobs_or_room(data: st.DataObject) -> None:
    lanes = [
        lane(10 + i, 1 + i % 3, data.draw(st.integers(0, 40)), priority=data.draw(st.integers(0, 2))) for i in range(6)
    ]
    workers = [
        active(100 + i, rows=data.draw(st.integers(1, 9)), leased=data.draw(st.integers(0, 25))) for i in range(3)
    ]
    at_home = homes(w100=(10,), w101=(11,), w102=(12,))
    made = plan(lanes, [Tenant(uid(t), 0) for t in (1, 2, 3)], workers, at_home)
    for number, num_jobs in taken(made, by="lane").items():
        assert num_jobs <= lanes[number - 10].num_queued
    room = {w.id.int: max(0, 2 * w.max_num_seqs - w.num_leased) for w in workers}
    given_to = taken(made)
    assert all(num_jobs <= room[worker] for worker, num_jobs in given_to.items())
    assert made.num_left == sum(ln.num_queued for ln in lanes) - given_to.total()
    left = sum(room.values()) - given_to.total()
    # What is left of the room is too little for a further load of an adapter with many jobs, and stays small.
    assert made.num_left == 0 or left == 0 or max(room[w] - given_to[w] for w in room) < Rules().jobs_a_load
