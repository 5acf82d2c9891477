"""The state machine of a job on real PostgreSQL: random operations, and a recount after each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger import Ledger, columns, reserve, result
from sqlalchemy import text

from medley.db import batches, crashes, demand, flags, retries, sweep_parts, sweeps, workers
from medley.db.connections import tenant_transaction
from medley.db.ends import End, end_unclaimed
from medley.db.inputs import fetch_inputs
from medley.db.lanes import Lane
from medley.db.new_jobs import add_batch_demand, append_columns
from medley.db.results import read_results
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState

ENDS = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]


class JobMachine(RuleBasedStateMachine):
    """Two tenants, four lanes, some workers; every rule is one transaction (or a short run of them) of a real part."""

    database: Any = None
    ledger: Ledger

    @initialize()
    def make_pool(self) -> None:
        self.ledger = Ledger(self.database, num_connections=1)
        self.tenants = [self.ledger.add_tenant(), self.ledger.add_tenant(weight=2.5)]
        self.revisions: dict[UUID, list[UUID | None]] = {
            tenant: [None, self.ledger.add_revision(tenant, "own")] for tenant in self.tenants
        }
        self.lanes = [revision or tenant for tenant in self.tenants for revision in self.revisions[tenant]]
        self.batches: list[tuple[UUID, UUID]] = []
        self.sweeps: list[UUID] = []
        self.workers = [self.ledger.start_worker(), self.ledger.start_worker()]

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()

    def _leased(self, worker: UUID) -> list[tuple[UUID, int]]:
        return sorted((row.id, row.attempt) for row in self.ledger.jobs().values() if row.worker_id == worker)

    @rule(who=st.integers(0, 1), num=st.integers(1, 5), priority=st.integers(0, 2), has_deadline=st.booleans())
    def submit(self, who: int, num: int, priority: int, has_deadline: bool) -> None:
        tenant = self.tenants[who]
        deadline_at = datetime.now(UTC) + timedelta(seconds=30) if has_deadline else None
        revisions = [self.revisions[tenant][i % 2] for i in range(num)]
        batch = self.ledger.submit(tenant, revisions, priority=priority, deadline_at=deadline_at)
        self.batches.append((tenant, batch))

    @rule(who=st.integers(0, 1), num=st.integers(1, 3))
    def submit_a_sweep(self, who: int, num: int) -> None:
        tenant = self.tenants[who]
        batch = batches.NewBatch(uuid7(), tenant, self.ledger.pool)
        sweep = sweeps.NewSweep(
            name=batch.id.hex,
            definition_sha256=hashlib.sha256(b"").digest(),
            sampling='{"max_tokens": 4}',
            seeds=[1],
            prompts=[sweeps.SweepPrompt("a prompt", None, "ok", None, None)] * num,
            columns=[sweeps.SweepColumn(None, None), sweeps.SweepColumn("own", self.revisions[tenant][1])],
        )
        with tenant_transaction(self.ledger.api, tenant) as conn:
            sweeps.create_sweep(conn, batch, sweep)
            reserve(conn, batch, sweep.num_cells, num_bytes=sweeps.prompt_bytes(sweep.prompts))
        self.batches.append((tenant, batch.id))
        self.sweeps.append(batch.id)

    @precondition(lambda self: self.sweeps)
    @rule(data=st.data())
    def expand_a_sweep(self, data: st.DataObject) -> None:
        with self.ledger.working() as conn:
            sweeps.expand(conn, data.draw(st.sampled_from(self.sweeps)), limit=3)

    @precondition(lambda self: self.sweeps)
    @rule(data=st.data(), num_prompts=st.integers(0, 2), seed=st.integers(1, 3))
    def extend_a_sweep(self, data: st.DataObject, num_prompts: int, seed: int) -> None:
        sweep = data.draw(st.sampled_from(self.sweeps))
        tenant = next(tenant for tenant, batch in self.batches if batch == sweep)
        prompts = [sweeps.SweepPrompt("another", None, "ok", None, None)] * num_prompts
        with tenant_transaction(self.ledger.api, tenant) as conn, suppress(sweep_parts.NotExtended):
            row = sweep_parts.lock_sweep(conn, sweep)
            seeds = [] if seed in row.seeds else [seed]
            num = sweep_parts.extend_sweep(conn, row, sweep_parts.Extension(prompts, [], seeds))
            batch = batches.NewBatch(sweep, tenant, self.ledger.pool)
            reserve(conn, batch, num, num_bytes=sweeps.prompt_bytes(prompts))

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), states=st.lists(st.sampled_from(ENDS[1:]), min_size=1, unique=True))
    def retry(self, data: st.DataObject, states: list[JobState]) -> None:
        tenant, batch = data.draw(st.sampled_from(self.batches))
        with tenant_transaction(self.ledger.api, tenant) as conn, suppress(retries.NotRetried):
            made = retries.retry(conn, batch, retries.Wanted(states))
            row = batches.read_batch(conn, batch)
            assert row is not None
            assert (made.num_jobs > 0) <= (row.finished_at is None)
            assert retries.retry(conn, batch, retries.Wanted(states)).num_jobs == 0, "each end is retried once"
            new = batches.NewBatch(batch, tenant, self.ledger.pool)
            reserve(conn, new, made.num_jobs, num_bytes=made.num_bytes)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), priority=st.integers(0, 2), has_deadline=st.booleans())
    def change(self, data: st.DataObject, priority: int, has_deadline: bool) -> None:
        tenant, batch = data.draw(st.sampled_from(self.batches))
        deadline_at = datetime.now(UTC) + timedelta(seconds=30) if has_deadline else None
        with tenant_transaction(self.ledger.api, tenant) as conn:
            flags.change_batch(conn, batch, {"priority": priority, "deadline_at": deadline_at})

    @rule(data=st.data(), counts=st.lists(st.integers(0, 4), min_size=4, max_size=4))
    def claim(self, data: st.DataObject, counts: list[int]) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        claimed = self.ledger.claim(worker, list(zip(self.lanes, counts, strict=True)))
        for lane, count in zip(self.lanes, counts, strict=True):
            assert sum(c.lane == lane for c in claimed) <= count

    @rule(data=st.data(), state=st.sampled_from(ENDS), num_tokens=st.integers(0, 3), is_stale=st.booleans())
    def complete(self, data: st.DataObject, state: JobState, num_tokens: int, is_stale: bool) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        held = self._leased(worker)
        chosen = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        results = [result(job, attempt - is_stale, state=state, num_tokens=num_tokens) for job, attempt in chosen]
        ended = self.ledger.store(worker, results)
        assert [e.job for e in ended] == ([] if is_stale else [job for job, _ in chosen])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        held = self._leased(worker)
        chosen = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        assert self.ledger.release(worker, chosen) == sorted(job for job, _ in chosen)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), what=st.sampled_from(["cancel", "pause", "resume"]))
    def flag(self, data: st.DataObject, what: str) -> None:
        tenant, batch = data.draw(st.sampled_from(self.batches))
        self.ledger.flag(tenant, batch, what)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel_one_job(self, data: st.DataObject) -> None:
        tenant, _ = data.draw(st.sampled_from(self.batches))
        mine = sorted(row.id for row in self.ledger.jobs().values() if row.tenant_id == tenant)
        if not mine:
            return
        job = data.draw(st.sampled_from(mine))
        was = self.ledger.jobs()[job].state
        with tenant_transaction(self.ledger.api, tenant) as conn:
            assert flags.cancel_job(conn, job) == (was in ("queued", "leased"))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def a_deadline_passes(self, data: st.DataObject) -> None:
        self.ledger.let_deadline_pass(data.draw(st.sampled_from(self.batches))[1])
        with self.ledger.working() as conn:
            flags.expire_queued(conn)

    @rule()
    def a_deadline_comes_near(self) -> None:
        with self.ledger.working() as conn:
            flags.hasten(conn, 60)

    @rule(data=st.data())
    def a_worker_dies_and_another_starts(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        held = self._leased(worker)
        assert self.ledger.die(worker) == len(held)
        assert self.ledger.complete(worker, held) == []
        assert self.ledger.release(worker, held) == []
        self.workers.remove(worker)
        self.workers.append(self.ledger.start_worker())

    @rule(data=st.data(), num=st.integers(1, 3))
    def an_engine_dies(self, data: st.DataObject, num: int) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        suspects = self._leased(worker)[:num]
        if not suspects:
            return
        with self.ledger.working() as conn:
            guilty, revisions = crashes.record_crash(conn, worker, suspects)
        rows = self.ledger.jobs()
        error = JobError(code=ErrorCode.JOB_QUARANTINED, message="it killed engines by itself")
        ended = [
            (row.id, row.attempt)
            for row in rows.values()
            if row.worker_id == worker and (row.id in guilty or row.revision_id in revisions)
        ]
        self.ledger.complete(worker, ended, state=JobState.FAILED, num_tokens=0, error=error)

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check()


def test_every_history_of_jobs_keeps_states_counts_usage_and_demand_right(module_database: Any) -> None:
    JobMachine.database = module_database
    run_state_machine_as_test(
        JobMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_claim_takes_the_highest_priority_first_then_the_oldest(ledger: Ledger) -> None:
    tenant = ledger.add_tenant()
    worker = ledger.start_worker()
    normal = ledger.submit(tenant, [None] * 2)
    high = ledger.submit(tenant, [None] * 2, priority=batches.HIGH)
    first = {ledger.jobs()[c.job].batch_id for c in ledger.claim(worker, [(tenant, 2)])}
    second = {ledger.jobs()[c.job].batch_id for c in ledger.claim(worker, [(tenant, 9)])}
    assert (first, second) == ({high}, {normal})


def test_a_flagged_job_is_told_to_its_worker_and_ends_as_asked(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    cancelled, paused, late = (ledger.submit(tenant, [None]) for _ in range(3))
    ledger.claim(worker, [(tenant, 9)])
    ledger.flag(tenant, cancelled, "cancel")
    ledger.flag(tenant, paused, "pause")
    ledger.let_deadline_pass(late)
    with ledger.working() as conn:
        found = {f.job: f.flag for f in flags.flagged(conn, worker)}
    assert found == {
        ledger.job_of(cancelled).id: flags.Flag.CANCEL,
        ledger.job_of(paused).id: flags.Flag.RELEASE,
        ledger.job_of(late).id: flags.Flag.EXPIRE,
    }
    assert len(ledger.release(worker, [(row.id, row.attempt) for row in ledger.jobs().values()])) == 3
    states = [ledger.job_of(batch).state for batch in (cancelled, paused, late)]
    assert states == ["cancelled", "queued", "expired"]
    assert ledger.demand() == {}
    ledger.flag(tenant, paused, "resume")
    assert ledger.demand() == {(tenant, batches.NORMAL): 1}
    ledger.check()


def test_a_released_job_keeps_its_tokens_and_an_ended_one_drops_them(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    batch = ledger.submit(tenant, [None])
    ledger.claim(worker, [(tenant, 1)])
    job = ledger.job_of(batch)
    ledger.release(worker, [(job.id, 1)])
    ledger.claim(worker, [(tenant, 1)])
    with ledger.working() as conn:
        (assigned,) = fetch_inputs(conn, worker, [job.id])
    assert assigned.checkpoint is not None
    assert assigned.checkpoint.token_ids == (1, 2)
    assert assigned.attempt == 2
    ledger.complete(worker, [(job.id, 2)])
    ledger.check()


def test_a_job_that_dies_alone_three_times_is_quarantined(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    batch = ledger.submit(tenant, [None])
    ledger.claim(worker, [(tenant, 1)])
    job = ledger.job_of(batch)
    verdicts = []
    for _ in range(crashes.ALONE_LIMIT):
        with ledger.working() as conn:
            verdicts.append(crashes.record_crash(conn, worker, [(job.id, 1)]))
    assert verdicts == [(set(), set()), (set(), set()), ({job.id}, set())]
    row = ledger.jobs()[job.id]
    assert (row.state, row.crashes, row.step_limit) == ("leased", 3, 1)


def test_a_crash_of_many_halves_the_steps_they_may_share(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None] * 6)
    held = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 6)])]
    with ledger.working() as conn:
        assert crashes.record_crash(conn, worker, held[:5]) == (set(), set())
    assert sorted(str(row.step_limit) for row in ledger.jobs().values()) == ["3"] * 5 + ["None"]


def test_an_adapter_whose_jobs_die_alone_is_quarantined_with_what_it_has_queued(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "killer")
    ledger.submit(tenant, [revision] * 6)
    ledger.submit(tenant, [None])
    held = [(c.job, c.attempt) for c in ledger.claim(worker, [(revision, 2)])]
    found = set()
    for suspect in (held[0], held[1], held[0]):
        with ledger.working() as conn:
            found |= crashes.record_crash(conn, worker, [suspect])[1]
    assert found == {revision}
    failed = [row for row in ledger.jobs().values() if row.state == "failed"]
    assert len(failed) == 4
    assert ledger.demand() == {(tenant, batches.NORMAL): 1}
    # What is still leased fails too when it comes back.
    assert ledger.die(worker) == 2
    assert sum(row.state == "failed" for row in ledger.jobs().values()) == 6
    ledger.check()


def test_a_near_deadline_raises_queued_jobs_to_the_top(ledger: Ledger) -> None:
    tenant = ledger.add_tenant()
    near = datetime.now(UTC) + timedelta(seconds=20)
    far = datetime.now(UTC) + timedelta(hours=1)
    ledger.submit(tenant, [None] * 2, deadline_at=near)
    ledger.submit(tenant, [None], deadline_at=far)
    held = ledger.submit(tenant, [None], deadline_at=near)
    ledger.flag(tenant, held, "pause")
    with ledger.working() as conn:
        assert flags.hasten(conn, 60) == 3
    assert ledger.demand() == {(tenant, batches.HIGH): 2, (tenant, batches.NORMAL): 1}
    ledger.flag(tenant, held, "resume")
    assert ledger.demand() == {(tenant, batches.HIGH): 3, (tenant, batches.NORMAL): 1}
    ledger.check()


def test_a_submit_in_parts_locks_nothing_of_the_demand(ledger: Ledger) -> None:
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None])
    batch = batches.NewBatch(uuid7(), tenant, ledger.pool)
    with tenant_transaction(ledger.api, tenant) as conn:
        batches.open_batch(conn, batch)
        for _ in range(3):
            append_columns(conn, batch, columns([None] * 2))
        add_batch_demand(conn, batch, [Lane(None, None, 6)])
        with ledger.working() as other:
            other.execute(text("SET LOCAL lock_timeout = 1"))
            change = demand.Change(tenant, batches.NORMAL, tenant, None, 1)
            demand.add_demand(other, ledger.pool, [change, change._replace(num_queued=-1)])
        batches.close_batch(conn, batch.id, 6)
        reserve(conn, batch, 6)
    assert ledger.demand() == {(tenant, batches.NORMAL): 7}
    ledger.check()


def test_a_text_with_nul_is_stored(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    batch = ledger.submit(tenant, [None])
    ((job, attempt),) = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 1)])]
    ledger.complete(worker, [(job, attempt)], text="a\0b")
    with ledger.working() as conn:
        (row,) = read_results(conn, batch, after=0, limit=10)
    assert row.text == "a\ufffdb"


@pytest.mark.parametrize("make", [lambda: End(JobState.CANCELLED), End.quarantined])
def test_an_end_without_a_worker_leaves_leased_jobs_alone(ledger: Ledger, make: Callable[[], End]) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None] * 3)
    ledger.claim(worker, [(tenant, 1)])
    with ledger.working() as conn:
        assert end_unclaimed(conn, list(ledger.jobs()), make()) == 2
    ledger.check()


def test_a_worker_that_left_cannot_renew(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    with ledger.working() as conn:
        workers.leave(conn, worker)
    with pytest.raises(workers.LeaseLost):
        ledger.renew(worker)
