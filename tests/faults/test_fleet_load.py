"""A load that rises and falls over three workers: as many are awake as it takes, and jobs move with what they have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self
from uuid import UUID

import pytest
from fleets import Fleet
from sqlalchemy import text
from stacks import Service, finish, long_jobs

from medley.client import Batch
from medley.db import workers
from medley.db.connections import transaction

pytestmark = pytest.mark.faults

SEED = 20261124
NUM_WORKERS, ROWS = 3, 8
LOW, HIGH = 5, 90  # jobs in flight at low load; jobs of the peak
NUM_LOW = 2_000  # jobs that the low load may come to


class Stream:
    """A steady low load: so many jobs at a time, each followed by another when it ends."""

    def __init__(self, service: Service, jobs: list[dict[str, object]]) -> None:
        self._service, self._jobs = service, jobs
        self.batches: list[Batch] = []
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(LOW)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ends.is_set():
            with self._lock:
                if not self._jobs:
                    return
                batch = self._service.client.submit_many([self._jobs.pop()])
                self.batches.append(batch)
            batch.wait(timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(timeout=120)


def test_as_many_workers_are_awake_as_the_load_takes_and_jobs_move_with_their_tokens(
    start_fleet: Callable[..., Fleet],
) -> None:
    fleet = start_fleet()
    service = fleet.service
    for number in range(NUM_WORKERS):
        # A lease that outlives any pause of the machine: nobody is to be taken for gone here.
        fleet.add("worker", f"worker{number}", MEDLEY_MAX_NUM_SEQS=str(ROWS), MEDLEY_LEASE_S="30")
    asleep = "SELECT count(*) FROM workers WHERE state = 'asleep'"
    service.wait_until("all are asleep", lambda: service.scalar(asleep) == NUM_WORKERS, 120)

    with Stream(service, long_jobs(SEED, NUM_LOW)) as stream:
        service.wait_until(
            "the first worker serves", lambda: any(b.refresh().counts.ended for b in stream.batches[:1]), 120
        )
        assert _awake_over(fleet, 2.0) == {1}, "one worker carries a low load"
        peak = service.client.submit_many(long_jobs(SEED + 1, HIGH))
        service.wait_until("all are awake", lambda: fleet.count_awake() == NUM_WORKERS, 120)
        drained = _drain_one(fleet)
        service.wait_until("its jobs run on elsewhere", lambda: _num_moved(service) > 0, 120)
        service.wait_progress(peak, 1.0, 240)
        service.wait_until("one is awake again", lambda: fleet.count_awake() == 1, 120)
    finish(service, peak, *stream.batches)

    failed = "SELECT count(*) FROM jobs WHERE state <> 'succeeded'"
    assert service.scalar(failed) == 0
    assert service.scalar("SELECT count(*) FROM workers WHERE state = 'gone'") == 0, f"{drained} was only drained"
    _judge_by_unmoved(service, peak, stream.batches)


def _awake_over(fleet: Fleet, seconds: float) -> set[int]:
    seen, until = set(), time.monotonic() + seconds
    while time.monotonic() < until:
        seen.add(fleet.count_awake())
        time.sleep(0.05)
    return seen


def _drain_one(fleet: Fleet) -> str:
    """Tells the worker with most jobs to give them back, as an operator would. Returns its id."""
    service = fleet.service
    busiest = (
        "SELECT w.id::text FROM workers w JOIN jobs j ON j.worker_id = w.id AND j.state = 'leased'"
        " WHERE w.state = 'active' GROUP BY w.id ORDER BY count(*) DESC LIMIT 1"
    )
    with transaction(service.engine) as conn:
        worker: str = conn.execute(text(busiest)).scalar_one()
        workers.desire(conn, UUID(worker), workers.WorkerState.DRAINING)
    return worker


def _num_moved(service: Service) -> int:
    """Jobs that another worker went on with."""
    return service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1 AND state <> 'queued'")


def _judge_by_unmoved(service: Service, peak: Batch, low: list[Batch]) -> None:
    """The jobs that moved once more, on the one worker that is left: each result is what it was."""
    with transaction(service.engine) as conn:
        statement = (
            "SELECT j.batch_id, i.custom_id FROM jobs j JOIN job_inputs i ON i.job_id = j.id WHERE j.attempt > 1"
        )
        moved = {(row.batch_id.hex, row.custom_id) for row in conn.execute(text(statement))}
    assert moved
    asked: list[dict[str, object]] = []
    before = {}
    for batches, jobs in (([peak], long_jobs(SEED + 1, HIGH)), (low, long_jobs(SEED, NUM_LOW))):
        by_id = {str(job["custom_id"]): job for job in jobs}
        for result in (r for b in batches for r in b.results() if (b.id[6:], r.custom_id) in moved):
            assert result.custom_id is not None
            name = str(len(asked))
            asked.append(by_id[result.custom_id] | {"custom_id": name})
            before[name] = (result.text, result.logprobs)
    assert len(before) == len(moved)
    again = service.client.submit_many(asked)
    finish(service, again)
    assert {r.custom_id: (r.text, r.logprobs) for r in again.results()} == before
