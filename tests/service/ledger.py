"""A pool's rows under test: makes tenants, jobs and workers through `medley.db` alone, and recounts the whole.

`Ledger.check` is the judge: whatever happened, what is stored must add up, and no job may have moved along an edge
that the state machine does not have.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Row, text

from medley.config import Quotas
from medley.db import adapters, batches, cancels, changes, ends, flags, queue, quotas, tenants, workers
from medley.db.connections import make_engine, tenant_transaction, transaction
from medley.db.new_jobs import JobColumns, NewJob, append_jobs
from medley.spec.errors import JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import Checkpoint, JobState

TERMINAL = {state.value for state in JobState if state.is_terminal}
EDGES = {"queued": {"queued", "leased", "cancelled", "expired", "failed"}, "leased": {"leased", "queued"} | TERMINAL}

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Seen:
    state: str
    attempt: int
    worker: UUID | None
    result: tuple[Any, ...] | None


# The tenants of a pool, with all that they have in any.
_USAGE = text(
    "SELECT u.queued_jobs, u.queued_bytes, sum(b.total - b.succeeded - b.failed - b.cancelled - b.expired) AS num_jobs,"
    " sum(b.queued_bytes) AS num_bytes FROM tenant_usage u JOIN batches b ON b.tenant_id = u.tenant_id"
    " WHERE u.tenant_id IN (SELECT tenant_id FROM batches WHERE pool = :pool)"
    " GROUP BY u.tenant_id, u.queued_jobs, u.queued_bytes"
)


class Ledger:
    """One pool of a database that several tests may share. `close` ends its connections."""

    def __init__(self, database: Any, *, num_connections: int = 2) -> None:
        self.pool = f"pool{next(_numbers)}"
        self.work_url: str = database.url("medley_work")
        self.work = make_engine(self.work_url, name="test", pool_size=num_connections)
        self.api = make_engine(database.url("medley_api"), name="test", pool_size=num_connections)
        self._owner = make_engine(database.url("medley_owner"), name="test", pool_size=1)
        self.weights: dict[UUID, float] = {}
        self._seen: dict[UUID, Seen] = {}
        self.has_aged = False  # ends were moved to other days: usage cannot be counted from them

    def close(self) -> None:
        for engine in (self.work, self.api, self._owner):
            engine.dispose()

    @contextmanager
    def working(self) -> Iterator[Connection]:
        with transaction(self.work) as conn:
            yield conn

    def add_tenant(self, *, weight: float = 1.0) -> UUID:
        name = f"tenant{next(_numbers)}"
        with transaction(self._owner) as conn:
            tenants.add_tenant(conn, name, weight=weight)
            tenant: UUID = conn.execute(text("SELECT id FROM tenants WHERE name = :name"), {"name": name}).scalar_one()
        self.weights[tenant] = weight
        return tenant

    def add_revision(self, tenant: UUID, name: str, *, size_bytes: int = 1) -> UUID:
        new = adapters.NewRevision(digest=f"{next(_numbers):064x}", max_rank=8, num_tiles=1, size_bytes=size_bytes)
        with tenant_transaction(self.api, tenant) as conn:
            revision, _ = adapters.add_revision(conn, tenant, name, new)
        return revision

    def submit(
        self,
        tenant: UUID,
        revisions: Sequence[UUID | None],
        *,
        priority: int = batches.NORMAL,
        deadline_at: datetime | None = None,
        max_tokens: int = 10,
    ) -> UUID:
        """One batch with a job for each of `revisions`."""
        batch = batches.NewBatch(uuid7(), tenant, self.pool, priority=priority, deadline_at=deadline_at)
        jobs = [NewJob("a prompt", None, revision, None, '{"max_tokens": 10}', max_tokens) for revision in revisions]
        with tenant_transaction(self.api, tenant) as conn:
            batches.open_batch(conn, batch, total=len(jobs))
            append_jobs(conn, batch, jobs)
            reserve(conn, batch, len(jobs), num_bytes=len("a prompt") * len(jobs))
        return batch.id

    def start_worker(self, state: workers.WorkerState = workers.WorkerState.ACTIVE, *, max_num_seqs: int = 8) -> UUID:
        worker = uuid7()
        room = workers.Room(max_num_seqs=max_num_seqs)
        with self.working() as conn:
            workers.register(
                conn,
                worker,
                pool=self.pool,
                host="here",
                pid=1,
                room=room,
                lease_s=60,
                desired=workers.WorkerState.ACTIVE,
            )
        self.renew(worker, state, max_num_seqs=max_num_seqs)
        return worker

    def renew(
        self,
        worker: UUID,
        state: workers.WorkerState = workers.WorkerState.ACTIVE,
        *,
        lease_s: float = 60,
        max_num_seqs: int = 8,
        resident: Sequence[UUID] = (),
        stats: object | None = None,
        batch: object | None = None,
    ) -> workers.WorkerState:
        said: dict[str, Any] = {"resident": resident, "stats": stats or {}, "batch": batch}
        with self.working() as conn:
            return workers.renew(
                conn, worker, lease_s=lease_s, state=state, room=workers.Room(max_num_seqs=max_num_seqs), **said
            )

    def lapse(self, worker: UUID) -> None:
        """Lets the worker's lease run out now."""
        with self.working() as conn:
            conn.execute(
                text("UPDATE workers SET lease_until = clock_timestamp() - interval '1 ms' WHERE id = :id"),
                {"id": worker},
            )

    def let_deadline_pass(self, batch: UUID) -> None:
        with self.working() as conn:
            conn.execute(
                text("UPDATE jobs SET deadline_at = clock_timestamp() - interval '1 ms' WHERE batch_id = :id"),
                {"id": batch},
            )

    def claim(self, worker: UUID, lanes: Sequence[tuple[UUID, int]]) -> list[Held]:
        with self.working() as conn:
            return claim_lanes(conn, self.pool, worker, lanes)

    def complete(self, worker: UUID, jobs: Sequence[tuple[UUID, int]], **fields: Any) -> list[ends.Ended]:
        """Completes (job, attempt) pairs, by default as succeeded with two tokens."""
        return self.store(worker, [result(job, attempt, **fields) for job, attempt in jobs])

    def store(self, worker: UUID, results: Sequence[ends.Result]) -> list[ends.Ended]:
        with self.working() as conn:
            return ends.complete(conn, worker, results)

    def release(self, worker: UUID, jobs: Sequence[tuple[UUID, int]]) -> list[UUID]:
        kept = Checkpoint(token_ids=(1, 2), logprobs=(-0.5, -0.25))
        with self.working() as conn:
            return queue.release(conn, worker, [queue.Release(job, attempt, kept) for job, attempt in jobs])

    def die(self, worker: UUID) -> int:
        """The worker's lease lapses and a leader takes its jobs back. Returns how many."""
        self.lapse(worker)
        with self.working() as conn:
            workers.mark_gone(conn, self.pool)
        with self.working() as conn:
            return workers.reclaim(conn, self.pool)

    def flag(self, tenant: UUID, batch: UUID, what: str) -> bool:
        act = {"cancel": cancels.cancel_batch, "pause": flags.pause_batch, "resume": flags.resume_batch}[what]
        with tenant_transaction(self.api, tenant) as conn:
            return act(conn, batch)

    def analyze(self) -> None:
        """Renews the planner's statistics."""
        with self._owner.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("ANALYZE"))

    def jobs(self) -> dict[UUID, Row[Any]]:
        with self.working() as conn:
            return self._read_jobs(conn)

    def job_of(self, batch: UUID) -> Row[Any]:
        """The batch's first job."""
        return min((row for row in self.jobs().values() if row.batch_id == batch), key=lambda row: row.id)

    def demand(self) -> dict[tuple[UUID, int], int]:
        """What the demand says: (lane, priority) -> jobs."""
        with self.working() as conn:
            rows = conn.execute(text("SELECT * FROM demand WHERE pool = :pool"), {"pool": self.pool}).all()
        return {(row.lane, row.priority): row.num_queued for row in rows if row.num_queued}

    def fold(self) -> None:
        """Puts all changes into the sums, as the leader does now and then."""
        with self.working() as conn:
            seen = changes.read_whole(conn, self.pool).horizon
        with self.working() as conn:
            assert changes.fold(conn, self.pool, changes.Folding(seen, 0, 0))

    def _read_jobs(self, conn: Connection) -> dict[UUID, Row[Any]]:
        rows = conn.execute(text("SELECT * FROM jobs WHERE pool = :pool"), {"pool": self.pool})
        return {row.id: row for row in rows}

    def check(self) -> None:
        """Raises AssertionError where anything stored does not add up, or a job moved where it must not.

        Moves are judged step by step: call it after each, or `recount` where several have been made.
        """
        self._check_moves(*self.recount())

    def recount(self) -> tuple[dict[UUID, Row[Any]], dict[UUID, Row[Any]]]:
        """(jobs, results) of the pool. Raises AssertionError where anything stored does not add up."""
        with self.working() as conn:
            conn.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            jobs = self._read_jobs(conn)
            in_pool = {"pool": self.pool}
            results = {
                row.job_id: row
                for row in conn.execute(
                    text("SELECT r.* FROM job_results r JOIN batches b ON b.id = r.batch_id WHERE b.pool = :pool"),
                    in_pool,
                )
            }
            usage = conn.execute(_USAGE, in_pool).all()
            batch_rows = conn.execute(text("SELECT * FROM batches WHERE pool = :pool"), in_pool).all()
            demand = conn.execute(text("SELECT * FROM demand WHERE pool = :pool"), in_pool).all()
            counters = conn.execute(text("SELECT * FROM tenant_counters WHERE pool = :pool"), in_pool).all()
            lane_rows = conn.execute(
                text("SELECT l.* FROM batch_lanes l JOIN batches b ON b.id = l.batch_id WHERE b.pool = :pool"), in_pool
            ).all()
            failures = conn.execute(
                text("SELECT f.* FROM batch_failures f JOIN batches b ON b.id = f.batch_id WHERE b.pool = :pool"),
                in_pool,
            ).all()
            used = conn.execute(
                text("SELECT * FROM usage WHERE tenant_id = ANY(:tenants)"),
                {"tenants": list({row.tenant_id for row in batch_rows})},
            ).all()
            kept = conn.execute(
                text("SELECT c.job_id FROM checkpoints c JOIN jobs j ON j.id = c.job_id WHERE j.pool = :pool"), in_pool
            ).scalars()
            assert all(jobs[job].state not in TERMINAL for job in kept), "an ended job keeps no checkpoint"
        assert {job for job, row in jobs.items() if row.state in TERMINAL} == set(results), "one result an ended job"
        _check_batches(batch_rows, jobs, results)
        _check_lanes(batch_rows, lane_rows, failures, jobs, results)
        if not self.has_aged:
            _check_usage(used, jobs, results)
        waiting = Counter(
            (row.lane, row.priority, row.tenant_id, row.revision_id)
            for row in jobs.values()
            if row.state == "queued" and not row.is_held
        )
        counted = {(row.lane, row.priority, row.tenant_id, row.revision_id): row.num_queued for row in demand}
        assert {key: n for key, n in counted.items() if n} == dict(waiting), "demand equals a recount"
        self._check_counters(counters, jobs, results)
        for row in usage:
            counted = (row.queued_jobs, row.queued_bytes)
            assert counted == (row.num_jobs, row.num_bytes), "what quotas count equals a recount"
        return jobs, results

    def _check_moves(self, jobs: dict[UUID, Row[Any]], results: dict[UUID, Row[Any]]) -> None:
        now = {job: Seen(row.state, row.attempt, row.worker_id, _end_of(results.get(job))) for job, row in jobs.items()}
        assert self._seen.keys() <= now.keys(), "no job is lost"
        for job, before in self._seen.items():
            after = now[job]
            if before.state in TERMINAL:
                assert after == before, "an end is final"
                continue
            assert after.state in EDGES[before.state], f"{before.state} -> {after.state}"
            claimed = (before.state, after.state) == ("queued", "leased")
            assert after.attempt == before.attempt + claimed, "a claim, and nothing else, is an attempt"
            if before.state == after.state == "leased":
                assert after.worker == before.worker
        self._seen = now

    def _check_counters(
        self, counters: Sequence[Row[Any]], jobs: dict[UUID, Row[Any]], results: dict[UUID, Row[Any]]
    ) -> None:
        tokens: Counter[UUID] = Counter()
        for job, row in jobs.items():
            if row.state == "leased":
                tokens[row.tenant_id] += row.est_tokens
            elif job in results and results[job].worker_id is not None:
                tokens[row.tenant_id] += results[job].prompt_tokens + 2 * results[job].completion_tokens
        stored = {row.tenant_id: row.service for row in counters}
        for tenant in tokens.keys() | stored.keys():
            expected = tokens[tenant] / self.weights[tenant]
            assert stored.get(tenant, 0.0) == pytest.approx(expected), "service is usage plus what is leased"


@dataclass(frozen=True)
class Held:
    job: UUID
    attempt: int
    lane: UUID


def claim_lanes(conn: Connection, pool: str, worker: UUID, lanes: Sequence[tuple[UUID, int]]) -> list[Held]:
    """Up to n jobs of each (lane, n), of the highest priority first."""
    statement = text("SELECT * FROM demand WHERE pool = :pool AND num_queued > 0 ORDER BY priority DESC")
    waiting = conn.execute(statement, {"pool": pool}).all()
    wants = []
    for lane, num_jobs in lanes:
        left = num_jobs
        for waits in waiting:
            if waits.lane == lane and left > 0:
                wants.append(queue.Want(worker, lane, waits.priority, min(left, waits.num_queued)))
                left -= wants[-1].num_jobs
    claimed = queue.claim(conn, pool, wants)
    return [Held(UUID(hex=job), attempt, got.want.lane) for got in claimed for job, attempt in got.jobs]


def reserve(conn: Connection, batch: batches.NewBatch, num_jobs: int, *, num_bytes: int = 0) -> None:
    """Counts what was added to `batch`, against the defaults."""
    quotas.reserve(conn, batch.tenant, Quotas(), batch.id, num_jobs=num_jobs, num_bytes=num_bytes)


def result(
    job: UUID,
    attempt: int,
    *,
    state: JobState = JobState.SUCCEEDED,
    num_tokens: int = 2,
    text: str | None = "ok",
    error: JobError | None = None,
    **others: Any,
) -> ends.Result:
    """A worker's result of `num_tokens` generated tokens."""
    return ends.Result(
        job=job,
        attempt=attempt,
        state=state,
        text=text,
        token_ids=(7,) * num_tokens,
        logprobs=(-0.1,) * num_tokens,
        prompt_tokens=3,
        error=error,
        **others,
    )


def columns(revisions: Sequence[UUID | None]) -> JobColumns:
    """A job for each of `revisions`, as one part of a long submit."""
    num = len(revisions)
    return JobColumns(
        revisions=revisions,
        adapters=[None] * num,
        max_tokens=[4] * num,
        seeds=[None] * num,
        custom_ids=[None] * num,
        prompts=["a prompt"] * num,
        samplings=["{}"] * num,
    )


def _end_of(result: Row[Any] | None) -> tuple[Any, ...] | None:
    """A result without what may follow it: that a retry supersedes it."""
    if result is None:
        return None
    return tuple(value for name, value in result._mapping.items() if name != "retried_by")


def _check_batches(batch_rows: Sequence[Row[Any]], jobs: dict[UUID, Row[Any]], results: dict[UUID, Row[Any]]) -> None:
    jobs_of: dict[UUID, list[Row[Any]]] = defaultdict(list)
    for row in jobs.values():
        jobs_of[row.batch_id].append(row)
    results_of: dict[UUID, list[Row[Any]]] = defaultdict(list)
    for found in results.values():
        results_of[found.batch_id].append(found)
    for batch in batch_rows:
        mine = results_of[batch.id]
        superseded = {r.job_id for r in mine if r.retried_by is not None}
        latest = [row for row in jobs_of[batch.id] if row.id not in superseded]
        states = Counter(row.state for row in latest)
        assert {s: getattr(batch, s) for s in TERMINAL} == {s: states[s] for s in TERMINAL}, "counts equal a recount"
        assert batch.retried == len(superseded), "what is superseded is counted"
        assert len({r.retried_by for r in mine} - {None}) == len(superseded), "a retry supersedes one result"
        assert {r.retried_by for r in mine} - {None} <= {row.id for row in jobs_of[batch.id]}
        assert sorted(r.seq for r in mine) == list(range(1, len(mine) + 1)), "results are numbered without a gap"
        assert batch.last_seq == len(mine)
        assert batch.prompt_tokens == sum(r.prompt_tokens for r in mine), "usage equals a recount"
        assert batch.completion_tokens == sum(r.completion_tokens for r in mine)
        assert all(jobs[r.job_id].state == r.state for r in mine)
        assert (batch.finished_at is not None) == (sum(states[s] for s in TERMINAL) == batch.total), (
            "finished when all have ended"
        )
        for row in jobs_of[batch.id]:
            if row.state == "queued":
                assert row.is_held == (batch.paused_at is not None), "queued jobs of a paused batch are held"
                assert batch.cancel_requested_at is None, "a cancelled batch has nothing queued"


def _check_lanes(
    batch_rows: Sequence[Row[Any]],
    lane_rows: Sequence[Row[Any]],
    failures: Sequence[Row[Any]],
    jobs: dict[UUID, Row[Any]],
    results: dict[UUID, Row[Any]],
) -> None:
    """A batch's lanes add up to it, and each equals a recount; so do its failures by code."""
    counted: dict[tuple[UUID, UUID | None], Counter[str]] = defaultdict(Counter)
    codes: Counter[tuple[UUID, UUID | None, str]] = Counter()
    for job, row in jobs.items():
        lane = counted[(row.batch_id, row.revision_id)]
        result = results.get(job)
        if result is not None:
            lane["prompt_tokens"] += result.prompt_tokens
            lane["completion_tokens"] += result.completion_tokens
        if result is None or result.retried_by is None:
            lane["total"] += 1
            lane[row.state] += 1
            if row.state == "failed":
                codes[(row.batch_id, row.revision_id, result.error_code or "unknown")] += 1  # type: ignore[union-attr]
    total: Counter[UUID] = Counter()
    for stored in lane_rows:
        total[stored.batch_id] += stored.total
        lane = counted[(stored.batch_id, stored.revision_id)]
        for name in (*TERMINAL, "prompt_tokens", "completion_tokens"):
            assert getattr(stored, name) == lane[name], f"a lane's {name} equals a recount"
        assert stored.total >= lane["total"], "cells that are no jobs yet count too"
    assert total == Counter({batch.id: batch.total for batch in batch_rows}), "lanes add up to their batch"
    assert {(f.batch_id, f.revision_id, f.code): f.num_jobs for f in failures if f.num_jobs} == dict(codes)


def _check_usage(used: Sequence[Row[Any]], jobs: dict[UUID, Row[Any]], results: dict[UUID, Row[Any]]) -> None:
    counted: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for job, result in results.items():
        if result.worker_id is not None:
            day = jobs[job].finished_at.astimezone(UTC).date()
            numbers = counted[(result.tenant_id, day, jobs[job].revision_id)]
            for i, num in enumerate((1, result.prompt_tokens, result.completion_tokens)):
                numbers[i] += num
    stored = {(u.tenant_id, u.day, u.revision_id): [u.num_jobs, u.prompt_tokens, u.completion_tokens] for u in used}
    assert stored == dict(counted), "usage equals a recount"
