"""What a fleet meets beside deaths: hangs, cut networks, wrong clocks, a full Redis, a killed PostgreSQL, poison."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import redis
from cuts import Way
from fleets import Fleet, Member
from stacks import LEASE_S, Service, finish, sweep_jobs

from medley.client import Batch

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEED = 20261126
ROWS = "8"


def _two_workers(fleet: Fleet, **environ: str) -> list[Member]:
    return [
        fleet.add("worker", f"worker{n}", **{"MEDLEY_MAX_NUM_SEQS": ROWS, "MEDLEY_START": "active"} | environ)
        for n in range(2)
    ]


def _busy(service: Service, members: list[Member]) -> Member:
    """A member that holds jobs."""
    held = "SELECT count(*) FROM workers w JOIN jobs j ON j.worker_id = w.id WHERE j.state = 'leased' AND w.pid = :pid"
    service.wait_until("a worker holds jobs", lambda: any(service.scalar(held, pid=m.pid) for m in members), 120)
    return max(members, key=lambda m: service.scalar(held, pid=m.pid))


def _run_on(service: Service, batch: Batch, num_jobs: int = 10) -> None:
    """Until some more jobs have ended."""
    before = batch.refresh().counts
    wanted = min(before.total, before.ended + num_jobs)
    service.wait_until("work goes on", lambda: batch.refresh().counts.ended >= wanted, 120)


def test_an_engine_that_hangs_is_started_again_and_its_jobs_go_on(start_fleet: Callable[..., Fleet]) -> None:
    fleet = start_fleet()
    service = fleet.service
    members = _two_workers(fleet, MEDLEY_ENGINE_STALL_S="3")
    batch = service.client.submit_many(sweep_jobs(SEED, 300))
    service.wait_progress(batch, 0.1)
    hanging = _busy(service, members)
    engine = hanging.engine_pid()
    assert engine is not None
    os.kill(engine, signal.SIGSTOP)
    service.wait_until("another engine runs", lambda: hanging.engine_pid() not in (None, engine), 120)
    finish(service, batch)
    assert all(r.state == "succeeded" for r in batch.results())


@pytest.mark.parametrize("way", [Way.CUT, Way.STALLED])
def test_a_worker_that_the_network_cuts_off_past_its_lease_changes_nothing_afterwards(
    start_fleet: Callable[..., Fleet], way: Way
) -> None:
    fleet = start_fleet()
    service = fleet.service
    members = _two_workers(fleet)
    batch = service.client.submit_many(sweep_jobs(SEED + 1, 400))
    service.wait_progress(batch, 0.1)
    lost = _busy(service, members)
    lost.set_network(way)
    gone = "SELECT count(*) FROM workers WHERE state = 'gone' AND pid = :pid"
    pid = lost.pid
    service.wait_until("it is taken for gone", lambda: bool(service.scalar(gone, pid=pid)), 120)
    _run_on(service, batch)
    lost.set_network(Way.OPEN)
    finish(service, batch)
    service.wait_until("it ends and begins anew", lambda: lost.pid != pid, 60)


def test_a_short_cut_of_the_network_costs_a_worker_nothing(start_fleet: Callable[..., Fleet]) -> None:
    fleet = start_fleet()
    service, draw = fleet.service, random.Random(SEED)
    members = _two_workers(fleet, MEDLEY_LEASE_S="30")
    batch = service.client.submit_many(sweep_jobs(SEED + 2, 300))
    for _ in range(4):
        member, way = draw.choice(members), draw.choice([Way.CUT, Way.STALLED])
        draw.choice([member.set_network, member.postgres.set, member.redis.set])(way)
        time.sleep(draw.uniform(0.1, LEASE_S / 2))
        member.set_network(Way.OPEN)
        _run_on(service, batch)
    finish(service, batch)
    assert service.scalar("SELECT count(*) FROM workers WHERE state = 'gone'") == 0
    assert service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1") == 0


def test_clocks_of_hosts_an_hour_apart_decide_nothing(start_fleet: Callable[..., Fleet]) -> None:
    fleet = start_fleet()
    service = fleet.service
    fleet.add("dispatcher", "dispatcher-ahead", skew_s=3600.0)
    for name, skew_s in (("worker-ahead", 3600.0), ("worker-behind", -3600.0)):
        fleet.add("worker", name, skew_s=skew_s, MEDLEY_MAX_NUM_SEQS=ROWS, MEDLEY_START="active")
    service.wait_until(
        "both are active", lambda: service.scalar("SELECT count(*) FROM workers WHERE state = 'active'") == 2, 120
    )
    batch = service.client.submit_many(sweep_jobs(SEED + 3, 200))
    service.wait_progress(batch, 0.2)
    # The one whose clock is ahead leads from now on.
    service.stack.kill("dispatcher", number=signal.SIGSTOP)
    _run_on(service, batch, 40)
    finish(service, batch)
    assert service.scalar("SELECT count(*) FROM workers WHERE state = 'gone'") == 0
    assert service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1 OR finished_at < leased_at") == 0
    assert service.scalar("SELECT count(DISTINCT worker_id) FROM job_results") == 2


def test_a_full_redis_costs_time_and_nothing_else(start_fleet: Callable[..., Fleet]) -> None:
    fleet = start_fleet()
    service = fleet.service
    _two_workers(fleet)
    running = service.client.submit_many(sweep_jobs(SEED + 4, 200))
    service.wait_progress(running, 0.1)
    with redis.Redis.from_url(service.stack.redis_url) as client:
        client.config_set("maxmemory", "1")  # nothing may be written any more
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("x", "y")
        began = time.monotonic()
        submitted = service.client.submit_many(sweep_jobs(SEED + 5, 50))
        assert time.monotonic() - began < 5
        _run_on(service, running, 60)
        service.wait_progress(submitted, 1.0)
        client.config_set("maxmemory", "0")
    finish(service, running, submitted)


def test_postgres_killed_under_two_workers_and_two_dispatchers_loses_nothing(
    start_fleet: Callable[..., Fleet],
) -> None:
    fleet = start_fleet()
    service, draw = fleet.service, random.Random(SEED)
    fleet.add("dispatcher", "dispatcher2")
    _two_workers(fleet)
    batch = service.client.submit_many(sweep_jobs(SEED + 6, 400))
    for share in sorted(draw.uniform(0.05, 0.7) for _ in range(2)):
        service.wait_progress(batch, share)
        service.stack.kill("postgres")
        service.wait_until("PostgreSQL is back", lambda: "postgres" in service.stack.pids(), 60)
        service.wait_until("it answers", lambda: _answers(service), 60)
    finish(service, batch)


def test_a_poison_job_is_found_by_several_workers_whose_engines_really_die(
    start_fleet: Callable[..., Fleet],
) -> None:
    fleet = start_fleet()
    service = fleet.service
    # Few rows a step: the culprit is found in two halvings, and each death costs the start of an engine.
    _two_workers(fleet, MEDLEY_ENGINE_FAILPOINT=f"die_on_token={ord('~')}", MEDLEY_MAX_NUM_SEQS="4")
    jobs = sweep_jobs(SEED + 7, 24)
    jobs[10]["prompt"] = "abc~="
    batch = service.client.submit_many(jobs)
    finish(service, batch, timeout_s=300)
    failed = [(r.custom_id, r.error.code if r.error else None) for r in batch.results() if r.state != "succeeded"]
    assert failed == [("10", "job_quarantined")]


def _answers(service: Service) -> bool:
    try:
        return service.scalar("SELECT 1") == 1
    except Exception:
        return False
