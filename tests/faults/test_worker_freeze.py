"""A worker stands still past its lease: its jobs go elsewhere, and nothing it says afterwards counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from stacks import Service, finish, sweep_jobs

pytestmark = pytest.mark.faults

SEED = 20261122


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(start_service: Callable[..., Service]) -> None:
    service = start_service(workers=2)
    batch = service.client.submit_many(sweep_jobs(SEED + 3, 400))
    service.wait_progress(batch, 0.2)
    service.wait_until(
        "a worker holds jobs", lambda: bool(service.scalar("SELECT count(*) FROM jobs WHERE state = 'leased'"))
    )
    frozen = service.scalar(
        "SELECT w.pid FROM workers w JOIN jobs j ON j.worker_id = w.id WHERE j.state = 'leased'"
        " GROUP BY w.pid ORDER BY count(*) DESC LIMIT 1"
    )
    name = next(name for name, pid in service.stack.pids().items() if pid == frozen)
    os.kill(frozen, signal.SIGSTOP)
    try:
        service.wait_until(
            "the frozen worker is taken for gone",
            lambda: bool(service.scalar("SELECT count(*) FROM workers WHERE state = 'gone' AND pid = :p", p=frozen)),
        )
        service.wait_until(
            "its jobs run elsewhere", lambda: bool(service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1"))
        )
    finally:
        os.kill(frozen, signal.SIGCONT)
    finish(service, batch)
    # It ended by itself, and was started again as another worker.
    service.wait_until("the stale worker ends", lambda: service.stack.pids().get(name) not in (None, frozen))
