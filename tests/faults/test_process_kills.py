"""Processes die or freeze in mid-sweep: every job still has exactly one result, and none waits longer than stated."""

from __future__ import annotations

import os
import random
import signal
import time
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


def test_a_killed_dispatcher_is_replaced_and_no_job_is_lost(start_service: Callable[..., Service]) -> None:
    service, rng = start_service(), random.Random(SEED + 1)
    batch = service.client.submit_many(sweep_jobs(SEED, 400))
    for share in sorted(rng.uniform(0.05, 0.8) for _ in range(2)):
        service.wait_progress(batch, share)
        service.stack.kill("dispatcher")
    finish(service, batch)


def test_a_killed_api_keeps_every_job_it_acknowledged(start_service: Callable[..., Service]) -> None:
    service, rng = start_service(), random.Random(SEED + 2)
    batches = []
    for number in range(4):
        batches.append(service.client.submit_many(sweep_jobs(SEED + number, 80)))
        time.sleep(rng.uniform(0, 0.3))
        service.stack.kill("api")  # the client's retries carry it over the restart
    finish(service, *batches)


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(start_service: Callable[..., Service]) -> None:
    service = start_service(workers=2)
    batch = service.client.submit_many(sweep_jobs(SEED + 3, 400))
    service.wait_progress(batch, 0.2)
    frozen = service.stack.pid("worker", 0)
    service.stack.kill("worker", 0, signal.SIGSTOP)
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
    service.wait_until("the stale worker ends", lambda: service.stack.pids().get("worker.0") not in (None, frozen))
