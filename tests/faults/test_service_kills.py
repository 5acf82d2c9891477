"""The dispatcher and the API die in mid-sweep: every job still has exactly one result."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from stacks import Service, finish, sweep_jobs

pytestmark = pytest.mark.faults

SEED = 20261122


@pytest.mark.slow  # test_leaders.py kills one beside another
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
