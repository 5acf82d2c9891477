"""Where claims begin to look in a lane: behind what was claimed, from the beginning again where that may miss one."""

from __future__ import annotations

from plain_plans import uid

from medley.dispatcher.heads import LOOK_AGAIN_S, Heads

QUEUE, OTHER = (uid(0), 1), (uid(64), 1)


def test_a_claim_begins_where_the_last_one_ended() -> None:
    heads = Heads()
    assert heads.starts([QUEUE], 0.0) == {}
    heads.see(QUEUE, uid(7), is_whole=True, started=False, now=0.0)
    heads.see(OTHER, uid(3), is_whole=True, started=False, now=0.0)
    assert heads.starts([QUEUE], 1.0) == {QUEUE: uid(7)}
    heads.see(QUEUE, uid(9), is_whole=True, started=True, now=1.0)
    assert heads.starts([QUEUE, OTHER], 2.0) == {QUEUE: uid(9), OTHER: uid(3)}


def test_a_lane_that_had_less_than_was_wanted_is_looked_at_from_its_beginning() -> None:
    heads = Heads()
    heads.see(QUEUE, uid(7), is_whole=True, started=False, now=0.0)
    heads.see(QUEUE, uid(8), is_whole=False, started=True, now=1.0)
    assert heads.starts([QUEUE], 1.0) == {}
    heads.see(QUEUE, None, is_whole=False, started=False, now=1.0)
    assert heads.starts([QUEUE], 1.0) == {}


def test_a_lane_is_looked_at_from_its_beginning_now_and_then_however_often_it_is_claimed_from() -> None:
    heads = Heads()
    heads.see(QUEUE, uid(1), is_whole=True, started=False, now=0.0)
    for second in range(1, int(LOOK_AGAIN_S)):
        assert QUEUE in heads.starts([QUEUE], float(second))
        heads.see(QUEUE, uid(second + 1), is_whole=True, started=True, now=float(second))
    assert heads.starts([QUEUE], 2 * LOOK_AGAIN_S) == {}


def test_a_lane_is_looked_at_from_its_beginning_where_jobs_came_before_its_head_not_behind() -> None:
    heads = Heads()
    for queue in (QUEUE, OTHER):
        heads.see(queue, uid(7), is_whole=True, started=False, now=0.0)
    heads.see_come([(QUEUE, uid(6)), (OTHER, uid(8)), ((uid(5), 1), uid(1))])
    assert heads.starts([QUEUE, OTHER], 1.0) == {OTHER: uid(7)}


def test_heads_of_lanes_with_returned_jobs_and_of_empty_lanes_are_forgotten() -> None:
    heads = Heads()
    for queue in (QUEUE, OTHER):
        heads.see(queue, uid(7), is_whole=True, started=False, now=0.0)
    heads.forget({QUEUE, (uid(5), 1)})
    assert heads.starts([QUEUE, OTHER], 1.0) == {OTHER: uid(7)}
    heads.keep_only({QUEUE})
    assert heads.starts([OTHER], 1.0) == {}
