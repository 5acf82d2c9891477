"""Three workers and two dispatchers under load, and whatever may happen to them, drawn from a seed; then the audit.

`MEDLEY_FAULT_SEED` chooses another sequence, `MEDLEY_FAULT_S` how long it lasts; a failure prints both and each act.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import pytest
import redis
from cuts import Way
from fleets import Fleet, Member
from sqlalchemy.exc import DBAPIError
from stacks import finish, sweep_jobs

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEED = int(os.environ.get("MEDLEY_FAULT_SEED", "20261127"))
DURATION_S = float(os.environ.get("MEDLEY_FAULT_S", "25"))


class Troubles:
    """Acts upon a fleet; each may leave something to be mended, which `mend` does."""

    def __init__(self, fleet: Fleet, draw: random.Random) -> None:
        self.fleet, self.draw = fleet, draw
        self._mends: list[Callable[[], None]] = []

    def act(self) -> str:
        others = [self.kill_engine, self.flush, self.fill, self.postgres]
        what = self.draw.choice([self.kill, self.stop, self.stop, self.cut, self.cut, *others])
        return f"{what.__name__} {what()}"

    def mend(self) -> None:
        for mend in self._mends:
            mend()
        self._mends.clear()

    def kill(self) -> str:
        member = self._one()
        member.send(signal.SIGKILL)
        return member.name

    def kill_engine(self) -> str:
        member = self.draw.choice(self.fleet.workers())
        if (pid := member.engine_pid()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return member.name

    def stop(self) -> str:
        member = self._one()
        member.send(signal.SIGSTOP)
        self._mends.append(lambda: member.send(signal.SIGCONT))
        return member.name

    def cut(self) -> str:
        member = self._one()
        way = self.draw.choice([Way.CUT, Way.STALLED])
        self.draw.choice([member.set_network, member.postgres.set, member.redis.set])(way)
        self._mends.append(lambda: member.set_network(Way.OPEN))
        return f"{member.name} {way.name}"

    def flush(self) -> str:
        with self._redis() as client:
            client.flushall()
        return ""

    def fill(self) -> str:
        with self._redis() as client:
            client.config_set("maxmemory", "1")
        self._mends.append(self._empty)
        return ""

    def postgres(self) -> str:
        self.fleet.service.stack.kill("postgres")
        return ""

    def _empty(self) -> None:
        with self._redis() as client:
            client.config_set("maxmemory", "0")

    def _redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.fleet.service.stack.redis_url)

    def _one(self) -> Member:
        return self.draw.choice([m for m in self.fleet.members.values() if m.child.exit_status() is None])


def test_whatever_happens_to_a_fleet_each_job_has_one_result(start_fleet: Callable[..., Fleet]) -> None:
    fleet, draw = start_fleet(), random.Random(SEED)
    service = fleet.service
    fleet.add("dispatcher", "dispatcher2")
    for number in range(3):
        fleet.add("worker", f"worker{number}", MEDLEY_MAX_NUM_SEQS="8", MEDLEY_START="active")
    batches = [service.client.submit_many(sweep_jobs(SEED, 150))]
    service.wait_progress(batches[0], 0.05)
    troubles, acts = Troubles(fleet, draw), []
    sys.stderr.write(f"MEDLEY_FAULT_SEED={SEED} MEDLEY_FAULT_S={DURATION_S}\n")
    began = time.monotonic()
    while time.monotonic() - began < DURATION_S:
        acts.append(troubles.act())
        sys.stderr.write(f"{time.monotonic() - began:5.1f} s  {acts[-1]}\n")
        until = time.monotonic() + draw.uniform(0.2, 3.0)
        while time.monotonic() < until:
            fleet.keep()
            time.sleep(0.05)
        troubles.mend()
        if draw.random() < 0.5:
            batches.append(service.client.submit_many(sweep_jobs(SEED + len(acts), 60)))
    troubles.mend()

    def answers() -> bool:
        with contextlib.suppress(DBAPIError):
            return service.scalar("SELECT 1") == 1
        return False

    service.wait_until("PostgreSQL answers", answers, 60)
    finish(service, *batches, timeout_s=300)
    # Engines that were killed in a step have their jobs rerun, alone where need be; none is at fault.
    assert service.scalar("SELECT count(*) FROM jobs WHERE state NOT IN ('succeeded', 'failed')") == 0
    failed = "SELECT count(*) FROM job_results WHERE state = 'failed' AND error_code <> 'job_quarantined'"
    assert service.scalar(failed) == 0
