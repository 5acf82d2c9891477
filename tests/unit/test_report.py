from __future__ import annotations

from uuid import uuid4

from medley.db.workers import Room, WorkerState
from medley.spec.wire import EngineStats
from medley_worker.shell.held import Share
from medley_worker.shell.report import MAX_SHARES, RATE_S, Report


def test_totals_go_on_over_engines_and_what_stands_does_not() -> None:
    report, revision = Report(8), uuid4()
    report.stands(WorkerState.ACTIVE, Room(8, 100, 16, 4))
    report.engine_says(EngineStats(steps=10, host_s=1.5, rows=40, pages_used=7, num_pages=100, resident=(revision,)))
    assert report.said().resident == (revision,)
    report.engine_ended()
    report.stands(WorkerState.ASLEEP)
    said = report.said()
    assert (said.state, said.room, said.resident) == (WorkerState.ASLEEP, Room(8), ())
    assert (said.stats["steps"], said.stats["pages_used"]) == (10, 0)
    report.engine_says(EngineStats(steps=5, host_s=0.5, pages_used=2))
    assert report.said().stats["host_s"] == 2.0
    assert (report.said().stats["steps"], report.said().stats["pages_used"]) == (15, 2)
    assert "resident" not in report.said().stats


def test_a_draining_worker_keeps_its_room() -> None:
    report = Report(8)
    report.stands(WorkerState.ACTIVE, Room(8, 100, 16, 4))
    report.drains()
    assert (report.said().state, report.said().room.num_pages) == (WorkerState.DRAINING, 100)


def test_rates_are_those_of_the_last_seconds_and_go_with_the_engine() -> None:
    now = 100.0
    report = Report(8, clock=lambda: now)
    for second in range(20):
        now = 100.0 + second
        steps = 10 * min(second, 10) + 20 * max(0, second - 10)  # twice as fast after ten seconds
        report.engine_says(
            EngineStats(steps=steps, step_s=steps / 100, rows=4 * steps, adapters=2 * steps, generated_tokens=4 * steps)
        )
    stats = report.said().stats
    assert (stats["steps_per_s"], stats["tokens_per_s"], stats["step_ms"]) == (20.0, 80.0, 10.0)
    assert (stats["rows_per_step"], stats["adapters_per_step"]) == (4.0, 2.0)
    now += RATE_S + 1
    assert "tokens_per_s" not in report.said().stats, "of an engine that says nothing"
    report.engine_ended()
    assert "tokens_per_s" not in report.said().stats


def test_as_many_shares_are_named_as_may_be_and_the_others_are_summed() -> None:
    report = Report(8)
    shares = [Share(uuid4(), None if n % 2 else uuid4(), 3, 1, n) for n in range(MAX_SHARES + 3)]
    report.batch_is(shares)
    batch = report.said().batch
    named, others = batch["shares"], batch["others"]
    assert isinstance(named, list)
    assert len(named) == MAX_SHARES
    assert named[1] == [shares[1].tenant.hex, None, 3, 1, 1]
    assert others == [9, 3, sum(range(MAX_SHARES, MAX_SHARES + 3)), 3]
    report.engine_ended()
    assert report.said().batch == {"shares": [], "others": [0, 0, 0, 0]}
