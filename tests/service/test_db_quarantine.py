"""Crashes and quarantine on real PostgreSQL: what is counted, and that nobody is left who runs the condemned."""

from __future__ import annotations

from ledger import Ledger
from sqlalchemy import text

from medley.db import crashes
from medley.db.inputs import fetch_inputs
from medley.spec.ids import uuid7


def test_a_death_that_is_noted_twice_counts_once(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "innocent")
    ledger.submit(tenant, [revision] * 2)
    first, second = [(c.job, c.attempt) for c in ledger.claim(worker, [(revision, 2)])]
    verdicts = []
    for suspect, num_notes in ((first, 3), (second, 1)):
        death = uuid7()
        for _ in range(num_notes):  # the answer to the commit was lost
            with ledger.working() as conn:
                verdicts.append(crashes.record_crash(conn, worker, [suspect], death=death))
    assert verdicts == [(set(), set())] * 4
    assert [ledger.jobs()[job].crashes for job, _ in (first, second)] == [1, 1]


def test_a_verdict_whose_answer_was_lost_is_given_again_and_to_other_workers(ledger: Ledger) -> None:
    tenant, worker, other = ledger.add_tenant(), ledger.start_worker(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "killer")
    ledger.submit(tenant, [revision] * 3)
    held = [(c.job, c.attempt) for c in ledger.claim(worker, [(revision, 2)])]
    elsewhere = [(c.job, c.attempt) for c in ledger.claim(other, [(revision, 1)])]
    death = uuid7()
    for suspect, name in ((held[0], uuid7()), (held[1], uuid7()), (held[0], death), (held[0], death)):
        with ledger.working() as conn:
            verdict = crashes.record_crash(conn, worker, [suspect], death=name)
    assert verdict == (set(), {revision})
    with ledger.working() as conn:
        assert crashes.record_crash(conn, other, elsewhere) == (set(), {revision})


def test_a_death_of_an_adapters_jobs_counts_against_it_for_a_day(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "steady")
    ledger.submit(tenant, [revision] * 4)
    held = [(c.job, c.attempt) for c in ledger.claim(worker, [(revision, 4)])]
    verdicts = []
    for suspect, age in zip(held, ("25 hours", "23 hours", "0 hours", "0 hours"), strict=True):
        with ledger.working() as conn:
            verdicts.append(crashes.record_crash(conn, worker, [suspect])[1])
            conn.execute(
                text("UPDATE crashes SET created_at = created_at - CAST(:age AS interval) WHERE job_id = :job"),
                {"age": age, "job": suspect[0]},
            )
    assert verdicts == [set(), set(), set(), {revision}]


def test_a_job_of_a_quarantined_adapter_reaches_its_worker_marked(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "killer")
    with ledger.working() as conn:
        crashes.quarantine(conn, revision)
    ledger.submit(tenant, [revision, None])  # was read as whole just before
    ledger.claim(worker, [(revision, 1), (tenant, 1)])
    with ledger.working() as conn:
        found = fetch_inputs(conn, worker, list(ledger.jobs()))
    assert {job.revision: job.is_quarantined for job in found} == {revision: True, None: False}
