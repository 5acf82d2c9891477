"""Results are read while the API is killed, and what failed is retried: each result once, in order, none missed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from stacks import Service, finish, sweep_jobs

from medley.client import Batch, Result

pytestmark = pytest.mark.faults

SEED = 20261123
NUM_JOBS = 60


def test_a_reader_of_partial_results_misses_none_and_sees_none_twice_over_kills_and_retries(
    start_service: Callable[..., Service],
) -> None:
    service, rng = start_service(), random.Random(SEED)
    jobs = sweep_jobs(SEED, NUM_JOBS)
    for job in rng.sample(jobs, 10):
        job["prompt_token_ids"] = [10**6]  # no token of the model: the job fails when it is run
        del job["prompt"]
    batch = service.client.submit_many(jobs)
    seen: list[Result] = []
    reader = threading.Thread(target=_read, args=(batch, seen))
    reader.start()
    for share in (rng.uniform(0.05, 0.3), rng.uniform(0.4, 0.7)):
        service.wait_progress(batch, share)
        service.stack.kill("api")
    reader.join(timeout=120)
    assert not reader.is_alive(), service.tail()
    assert [r.seq for r in seen] == list(range(1, NUM_JOBS + 1))
    failed = {r.id for r in seen if r.state == "failed"}
    assert len(failed) == 10

    # A retry whose answer is lost with its process is asked for again, and is made once.
    killer = threading.Timer(rng.uniform(0, 0.05), service.stack.kill, args=("api",))
    killer.start()
    status = batch.retry()
    killer.join()
    assert status.counts.retried == 10
    after = list(batch.results(after=seen[-1].seq, timeout=120))
    assert {r.retry_of for r in after} == failed
    assert [r.seq for r in after] == list(range(NUM_JOBS + 1, NUM_JOBS + 11))
    latest = list(batch.results(latest=True))
    assert sorted(r.custom_id or "" for r in latest) == sorted(str(i) for i in range(NUM_JOBS))
    finish(service, batch)


def _read(batch: Batch, seen: list[Result]) -> None:
    """Goes on at its cursor whatever happens."""
    seen.extend(batch.results(timeout=120))
