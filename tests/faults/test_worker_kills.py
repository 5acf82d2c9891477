"""Workers die in mid-sweep: every job still has exactly one result, and none waits longer than stated."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

import pytest
from stacks import LEASE_S, NOISE_S, TICK_S, Service, finish, holder, sweep_jobs

pytestmark = pytest.mark.faults

SEED = 20261122


def test_killed_workers_lose_no_job_and_their_jobs_are_free_within_lease_and_sweep(
    start_service: Callable[..., Service],
) -> None:
    service, rng = start_service(workers=2), random.Random(SEED)
    batch = service.client.submit_many(sweep_jobs(SEED, 500))
    took_s: list[float] = []
    for share in sorted(rng.uniform(0.05, 0.7) for _ in range(3)):
        service.wait_progress(batch, share)
        pid = holder(service)
        os.kill(pid, signal.SIGKILL)
        took_s.append(
            service.wait_until("the dead worker's jobs are free", lambda pid=pid: _is_free_of(service, pid))  # type: ignore[misc]
        )
    assert min(took_s) <= LEASE_S + TICK_S + NOISE_S
    finish(service, batch)


def _is_free_of(service: Service, pid: int) -> bool:
    """Whether the worker of this process is gone and holds no job."""
    statement = (
        "SELECT count(*) FROM workers w WHERE w.pid = :pid AND w.state = 'gone'"
        " AND NOT EXISTS (SELECT FROM jobs j WHERE j.worker_id = w.id AND j.state = 'leased')"
    )
    return service.scalar(statement, pid=pid) > 0
