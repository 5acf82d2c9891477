"""Workers die in mid-sweep: every job still has exactly one result, and none waits longer than stated."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from stacks import LEASE_S, NOISE_S, TICK_S, Service, finish, sweep_jobs

pytestmark = pytest.mark.faults

SEED = 20261122


def test_killed_workers_lose_no_job_and_their_jobs_are_free_within_lease_and_sweep(
    start_service: Callable[..., Service],
) -> None:
    service, rng = start_service(workers=2), random.Random(SEED)
    batch = service.client.submit_many(sweep_jobs(SEED, 500))
    for share in sorted(rng.uniform(0.05, 0.7) for _ in range(3)):
        service.wait_progress(batch, share)
        service.stack.kill("worker", rng.randrange(2))
        took_s = service.wait_until(
            "the dead worker's jobs are free",
            lambda: (
                not service.scalar(
                    "SELECT count(*) FROM jobs j JOIN workers w ON w.id = j.worker_id"
                    " WHERE j.state = 'leased' AND (w.state = 'gone' OR w.lease_until < clock_timestamp())"
                )
                and bool(service.scalar("SELECT count(*) FROM workers WHERE state = 'gone'"))
            ),
        )
        assert took_s <= LEASE_S + TICK_S + NOISE_S
    finish(service, batch)
