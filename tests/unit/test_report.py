from __future__ import annotations

from uuid import uuid4

from medley.db.workers import Room, WorkerState
from medley.spec.wire import EngineStats
from medley_worker.shell.report import Report


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
