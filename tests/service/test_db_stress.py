"""Everyone writes at once: no deadlock, no lost job, and the sums still add up."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from ledger import Ledger, columns, reserve, result
from sqlalchemy import text

from medley.db import batches, crashes, flags, retries, workers
from medley.db.connections import tenant_transaction
from medley.db.inputs import assigned
from medley.db.lanes import Lane
from medley.db.new_jobs import add_batch_demand, append_columns
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState


class Crowd:
    """Threads that each repeat one act until the time is over; the first error of any ends all."""

    def __init__(self, database: Any) -> None:
        self.ledger = Ledger(database, num_connections=12)
        self.tenants = [self.ledger.add_tenant() for _ in range(3)]
        self.revisions: dict[UUID, list[UUID | None]] = {
            t: [None, *(self.ledger.add_revision(t, f"a{i}") for i in range(3))] for t in self.tenants
        }
        self.batches: list[tuple[UUID, UUID]] = []
        self.workers = [self.ledger.start_worker() for _ in range(3)]
        self.errors: list[BaseException] = []
        self.num_acts = 0
        self._end, self._wanted = 0.0, 0
        self._lock = threading.Lock()

    def run(self, acts: Sequence[Callable[[random.Random], None]], *, seconds: float, num_acts: int = 0) -> None:
        """For `seconds`, and on until there were more than `num_acts`."""
        self._end, self._wanted = time.monotonic() + seconds, num_acts
        threads = [threading.Thread(target=self._repeat, args=(act, i)) for i, act in enumerate(acts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

    def _repeat(self, act: Callable[[random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        while (time.monotonic() < self._end or self.num_acts <= self._wanted) and not self.errors:
            try:
                act(draw)
            except BaseException as error:
                self.errors.append(error)
            with self._lock:
                self.num_acts += 1

    def submit(self, draw: random.Random) -> None:
        tenant = draw.choice(self.tenants)
        revisions = [draw.choice(self.revisions[tenant]) for _ in range(30)]
        batch = self.ledger.submit(tenant, revisions, priority=draw.randrange(3))
        with self._lock:
            self.batches.append((tenant, batch))

    def claim(self, draw: random.Random) -> None:
        lanes = [(revision or t, draw.randrange(12)) for t in self.tenants for revision in self.revisions[t]]
        draw.shuffle(lanes)
        self.ledger.claim(draw.choice(self.workers), lanes)

    def _some(self, draw: random.Random) -> tuple[UUID, list[tuple[UUID, int]]]:
        worker = draw.choice(self.workers)
        with self.ledger.working() as conn:
            held = assigned(conn, worker)
        draw.shuffle(held)
        return worker, held[: draw.randrange(1, 40)]

    def complete(self, draw: random.Random) -> None:
        worker, held = self._some(draw)
        if held:
            states = [draw.choice([JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED]) for _ in held]
            results = [result(job, attempt, state=s) for (job, attempt), s in zip(held, states, strict=True)]
            self.ledger.store(worker, results)

    def release(self, draw: random.Random) -> None:
        worker, held = self._some(draw)
        self.ledger.release(worker, held[:10])

    def flag(self, draw: random.Random) -> None:
        if self.batches:
            tenant, batch = draw.choice(self.batches)
            self.ledger.flag(tenant, batch, draw.choice(["cancel", "pause", "resume", "resume"]))

    def retry(self, draw: random.Random) -> None:
        if self.batches:
            tenant, batch = draw.choice(self.batches)
            with tenant_transaction(self.ledger.api, tenant) as conn, suppress(retries.NotRetried):
                made = retries.retry(conn, batch, retries.Wanted([JobState.FAILED, JobState.CANCELLED]))
                new = batches.NewBatch(batch, tenant, self.ledger.pool)
                reserve(conn, new, made.num_jobs, num_bytes=made.num_bytes)

    def change(self, draw: random.Random) -> None:
        if self.batches:
            tenant, batch = draw.choice(self.batches)
            with tenant_transaction(self.ledger.api, tenant) as conn:
                flags.change_batch(conn, batch, {"priority": draw.randrange(3)})

    def cancel_jobs(self, draw: random.Random) -> None:
        _, held = self._some(draw)
        for job, _ in held[:3]:
            with self.ledger.working() as conn:
                tenant = conn.execute(text("SELECT tenant_id FROM jobs WHERE id = :id"), {"id": job}).scalar_one()
            with tenant_transaction(self.ledger.api, tenant) as conn:
                flags.cancel_job(conn, job)

    def expire(self, draw: random.Random) -> None:
        if self.batches:
            _, batch = draw.choice(self.batches)
            near = "UPDATE jobs SET deadline_at = clock_timestamp() + interval '10 ms' WHERE id IN ("
            some = "SELECT id FROM jobs WHERE batch_id = :id AND state = 'queued' LIMIT 5 FOR UPDATE SKIP LOCKED)"
            with self.ledger.working() as conn:
                conn.execute(text(near + some), {"id": batch})
        with self.ledger.working() as conn:
            flags.hasten(conn, 60)
        with self.ledger.working() as conn:
            flags.expire_queued(conn)

    def die(self, draw: random.Random) -> None:
        # The row of the list is replaced first, so that new claims find the successor.
        at = draw.randrange(len(self.workers))
        old, self.workers[at] = self.workers[at], self.ledger.start_worker()
        with self.ledger.working() as conn:
            held = assigned(conn, old)[:4]
            if held:
                crashes.record_crash(conn, old, held)
        self.ledger.lapse(old)
        with self.ledger.working() as conn:
            workers.mark_gone(conn, self.ledger.pool)
        with self.ledger.working() as conn:
            workers.reclaim(conn, self.ledger.pool)
        time.sleep(0.05)


@pytest.fixture
def crowd(database: Any) -> Iterator[Crowd]:
    made = Crowd(database)
    yield made
    made.ledger.close()


def test_submits_claims_ends_flags_and_deaths_at_once_neither_deadlock_nor_lose_a_job(crowd: Crowd) -> None:
    writers = [crowd.submit, crowd.submit, crowd.claim, crowd.claim, crowd.complete, crowd.complete, crowd.complete]
    others = [crowd.release, crowd.flag, crowd.retry, crowd.change, crowd.cancel_jobs, crowd.expire, crowd.die]
    crowd.run([*writers, *others], seconds=4, num_acts=100)
    assert crowd.errors == []
    assert crowd.num_acts > 100
    crowd.ledger.check()


def test_long_submits_of_one_tenant_at_once_do_not_deadlock(crowd: Crowd) -> None:
    tenant = crowd.tenants[0]

    def submit_in_parts(draw: random.Random) -> None:
        batch = batches.NewBatch(uuid7(), tenant, crowd.ledger.pool)
        lanes: Counter[UUID | None] = Counter()
        with tenant_transaction(crowd.ledger.api, tenant) as conn:
            batches.open_batch(conn, batch)
            for _ in range(4):
                revision = draw.choice(crowd.revisions[tenant])
                append_columns(conn, batch, columns([revision] * 5))
                lanes[revision] += 5
            add_batch_demand(conn, batch, [Lane(revision, None, num) for revision, num in lanes.items()])
            batches.close_batch(conn, batch.id, 20)
            reserve(conn, batch, 20)

    crowd.run([submit_in_parts] * 6, seconds=2)
    assert crowd.errors == []
    crowd.ledger.check()
