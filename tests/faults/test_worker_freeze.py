"""A worker stands still past its lease: its jobs go elsewhere, and nothing it says afterwards counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from stacks import Service, finish, holder, long_jobs

pytestmark = [pytest.mark.faults, pytest.mark.slow]  # test_shell_ends.py freezes one worker by itself

SEED = 20261122


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(start_service: Callable[..., Service]) -> None:
    service = start_service(workers=2)
    batch = service.client.submit_many(long_jobs(SEED + 3, 100))
    service.wait_progress(batch, 0.2)
    frozen = holder(service)
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
