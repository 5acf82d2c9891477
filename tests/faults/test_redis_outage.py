"""Redis forgets everything, and is away: nothing that was promised rests on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import redis
from stacks import Service, finish, long_jobs, sweep_jobs
from timing import keeps_to, timed

from medley.client import Batch

pytestmark = pytest.mark.faults

OUTAGE_S = 10.0


def test_flushed_in_mid_sweep_nothing_is_lost(start_service: Callable[..., Service]) -> None:
    service = start_service()
    batch = service.client.submit_many(sweep_jobs(1, 300))
    for share in (0.1, 0.4, 0.7):
        service.wait_progress(batch, share)
        with redis.Redis.from_url(service.stack.redis_url) as client:
            client.flushall()
    finish(service, batch)


def test_jobs_go_on_and_new_ones_are_taken_while_redis_hangs(start_service: Callable[..., Service]) -> None:
    service = start_service()
    running = service.client.submit_many(long_jobs(2, 130))
    service.wait_progress(running, 0.1)
    pid = service.stack.pid("redis")
    started = time.monotonic()
    service.stack.kill("redis", number=signal.SIGSTOP)
    try:
        submitted: list[Batch] = []

        def submit() -> float:
            with timed() as took:
                submitted.append(service.client.submit_many(sweep_jobs(3, 50)))
            return took.seconds

        keeps_to(5, submit, "a submit must not wait for Redis")
        done = running.refresh().counts.ended
        service.wait_until("results while Redis hangs", lambda: running.refresh().counts.ended > done + 20)
        time.sleep(max(0.0, OUTAGE_S - (time.monotonic() - started)))  # the outage's own length
    finally:
        os.kill(pid, signal.SIGCONT)
    finish(service, running, *submitted)
