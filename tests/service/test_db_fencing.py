"""Who may write: attempts, leases, workers and terms fence every write that is no longer anyone's to make."""

from __future__ import annotations

from uuid import UUID

import pytest
from ledger import Ledger, claim_lanes
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from medley.db import chores, leaders, workers
from medley.db.connections import tenant_transaction, transaction
from medley.spec.ids import uuid7


def _claim_one(ledger: Ledger, worker: UUID) -> tuple[UUID, int]:
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None])
    (claimed,) = ledger.claim(worker, [(tenant, 1)])
    return claimed.job, claimed.attempt


def test_a_write_of_an_earlier_attempt_is_dropped(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    job, attempt = _claim_one(ledger, worker)
    ledger.release(worker, [(job, attempt)])
    ledger.claim(worker, [(ledger.jobs()[job].lane, 1)])
    assert ledger.complete(worker, [(job, attempt)]) == []
    assert ledger.release(worker, [(job, attempt)]) == []
    assert [e.job for e in ledger.complete(worker, [(job, attempt + 1)])] == [job]
    ledger.check()


def test_a_lapsed_lease_writes_nothing_even_before_anyone_noticed(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    job, attempt = _claim_one(ledger, worker)
    ledger.lapse(worker)
    assert ledger.complete(worker, [(job, attempt)]) == []
    assert ledger.release(worker, [(job, attempt)]) == []
    with pytest.raises(workers.LeaseLost):
        ledger.renew(worker)
    assert ledger.jobs()[job].state == "leased"


def test_a_gone_worker_writes_nothing_and_its_jobs_go_back(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    job, attempt = _claim_one(ledger, worker)
    assert ledger.die(worker) == 1
    assert ledger.complete(worker, [(job, attempt)]) == []
    assert ledger.jobs()[job].state == "queued"
    ledger.check()


def test_another_worker_cannot_end_a_job(ledger: Ledger) -> None:
    worker, other = ledger.start_worker(), ledger.start_worker()
    job, attempt = _claim_one(ledger, worker)
    assert ledger.complete(other, [(job, attempt)]) == []
    assert ledger.release(other, [(job, attempt)]) == []
    assert len(ledger.complete(worker, [(job, attempt)])) == 1


def test_the_second_of_two_ends_is_dropped(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    held = _claim_one(ledger, worker)
    assert len(ledger.complete(worker, [held, held])) == 1
    assert ledger.complete(worker, [held]) == []
    ledger.check()


@pytest.mark.parametrize("state", ["asleep", "draining"])
def test_a_worker_that_takes_no_jobs_gets_none(ledger: Ledger, state: str) -> None:
    worker = ledger.start_worker(workers.WorkerState(state))
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None])
    assert ledger.claim(worker, [(tenant, 1)]) == []


def test_a_worker_without_a_live_lease_gets_nothing(ledger: Ledger) -> None:
    worker = ledger.start_worker()
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None])
    ledger.lapse(worker)
    assert ledger.claim(worker, [(tenant, 1)]) == []
    assert ledger.demand() == {(tenant, 1): 1}


def test_two_claims_at_once_never_take_the_same_job(ledger: Ledger) -> None:
    one, two = ledger.start_worker(), ledger.start_worker()
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None] * 6)
    rows = "SELECT id FROM jobs WHERE pool = :pool ORDER BY id LIMIT 3 FOR UPDATE"
    with transaction(ledger.work) as first, transaction(ledger.work) as second:
        # The first connection has the first three rows in hand, as a claim in mid-transaction has.
        taken = set(first.execute(text(rows), {"pool": ledger.pool}).scalars())
        skipped = {c.job for c in claim_lanes(second, ledger.pool, two, [(tenant, 3)])}
        assert len(skipped) == 3
        assert not skipped & taken
    rest = {c.job for c in ledger.claim(one, [(tenant, 6)])}
    assert rest == taken
    ledger.check()


def test_a_lead_is_held_by_one_and_begins_a_new_term_when_it_lapses(ledger: Ledger) -> None:
    me, other = uuid7(), uuid7()
    with ledger.working() as conn:
        assert leaders.lead(conn, ledger.pool, me, term_s=60) == 1
        assert leaders.lead(conn, ledger.pool, me, term_s=60) == 1
        assert leaders.lead(conn, ledger.pool, other, term_s=60) is None
        leaders.resign(conn, ledger.pool, me, 1)
    with ledger.working() as conn:
        assert leaders.lead(conn, ledger.pool, other, term_s=60) == 2
        assert leaders.lead(conn, ledger.pool, me, term_s=60) is None


def test_a_stale_leader_writes_nothing(ledger: Ledger) -> None:
    worker, tenant = ledger.start_worker(), ledger.add_tenant()
    ledger.submit(tenant, [None])
    me, other = uuid7(), uuid7()
    with ledger.working() as conn:
        term = leaders.lead(conn, ledger.pool, me, term_s=60)
        assert term is not None
        leaders.resign(conn, ledger.pool, me, term)
    with ledger.working() as conn:
        leaders.lead(conn, ledger.pool, other, term_s=60)

    def claim_in_the_old_term() -> None:
        with ledger.working() as conn:
            leaders.hold_term(conn, ledger.pool, me, term)
            claim_lanes(conn, ledger.pool, worker, [(tenant, 1)])

    with pytest.raises(leaders.TermLost):
        claim_in_the_old_term()
    assert ledger.demand() == {(tenant, 1): 1}


def test_a_term_that_lapsed_is_lost_even_when_nobody_took_it(ledger: Ledger) -> None:
    me = uuid7()
    with ledger.working() as conn:
        term = leaders.lead(conn, ledger.pool, me, term_s=0)
        assert term is not None
    with pytest.raises(leaders.TermLost), ledger.working() as conn:
        leaders.hold_term(conn, ledger.pool, me, term)
    with ledger.working() as conn:
        assert leaders.lead(conn, ledger.pool, me, term_s=60) == term + 1


def test_a_standby_that_looks_never_waits_for_the_leader(ledger: Ledger) -> None:
    me, other = uuid7(), uuid7()
    with ledger.working() as conn:
        term = leaders.lead(conn, ledger.pool, me, term_s=60)
        assert term is not None
    with ledger.working() as leading, ledger.working() as standing_by:
        leaders.hold_term(leading, ledger.pool, me, term)
        standing_by.execute(text("SET LOCAL lock_timeout = '1ms'"))
        assert leaders.lead(standing_by, ledger.pool, other, term_s=60) is None


def test_chores_are_due_exactly_when_there_is_something_to_do(ledger: Ledger) -> None:
    def due() -> set[str]:
        with ledger.working() as conn:
            found = chores.read_due(conn, ledger.pool)
        return {name for name in ("mark_gone", "reclaim") if getattr(found, name)}

    worker = ledger.start_worker()
    _claim_one(ledger, worker)
    assert due() == set()
    ledger.lapse(worker)
    assert due() == {"mark_gone"}
    with ledger.working() as conn:
        assert workers.mark_gone(conn, ledger.pool) == [worker]
    assert due() == {"reclaim"}
    with ledger.working() as conn:
        assert workers.reclaim(conn, ledger.pool) == 1
    assert due() == set()


@pytest.mark.parametrize(
    "write",
    [
        "UPDATE jobs SET attempt = attempt + 1",
        "UPDATE jobs SET attempt = 2",
        "UPDATE job_results SET state = 'succeeded'",
        "UPDATE usage SET num_jobs = 0",
        "UPDATE sweeps SET num_expanded = 0",
        "UPDATE adapter_revisions SET quarantined_at = NULL",
        "UPDATE counter_sums SET service = 0",
        "INSERT INTO counter_changes (pool, tenant_id, service) SELECT 'p', id, -1 FROM tenants",
        "DELETE FROM jobs",
        "UPDATE workers SET state = 'active'",
    ],
)
def test_the_api_may_not_write_what_the_others_stand_on(ledger: Ledger, write: str) -> None:
    with tenant_transaction(ledger.api, ledger.add_tenant()) as conn, pytest.raises(ProgrammingError):
        conn.execute(text(write))
