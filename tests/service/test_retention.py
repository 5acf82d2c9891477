"""Retention: what a tenant no longer keeps is not seen at once, and is gone soon; everything else stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from aging import days_ago, end_aged, make_partitions, run_aged, submit_aged
from ledger import Ledger
from sqlalchemy import create_engine, text

from medley.db import batches, leaders, partitions, retention, sweeps, usage, webhooks
from medley.db.connections import tenant_transaction, transaction
from medley.db.models import metadata
from medley.db.results import read_job
from medley.spec.ids import uuid7
from medley.tasks import retention as tasks
from medley.tasks.retention import keep_retention


@pytest.fixture
def own(database: Any) -> Iterator[Ledger]:
    made = Ledger(database)
    yield made
    made.close()


def keep_days(database: Any, tenant: UUID, days: int) -> None:
    engine = create_engine(database.url("medley_owner"))
    try:
        with engine.begin() as conn:
            name = conn.execute(text("SELECT name FROM tenants WHERE id = :id"), {"id": tenant}).scalar_one()
            assert retention.set_retention(conn, name, days)
    finally:
        engine.dispose()


def seen(ledger: Ledger, tenant: UUID, batch: UUID) -> tuple[bool, int, int]:
    """(whether the tenant sees the batch, how many inputs and how many results of it)."""
    with tenant_transaction(ledger.api, tenant) as conn:
        counts = [
            conn.execute(text(f"SELECT count(*) FROM {table} WHERE batch_id = :id"), {"id": batch}).scalar_one()
            for table in partitions.TABLES
        ]
        return batches.read_batch(conn, batch) is not None, *counts


def stored(ledger: Ledger, batch: UUID) -> dict[str, int]:
    """Rows that are there, seen or not."""
    tables = {"batches": "id", "jobs": "batch_id", "job_inputs": "batch_id", "job_results": "batch_id"}
    with ledger.working() as conn:
        return {
            table: conn.execute(text(f"SELECT count(*) FROM {table} WHERE {column} = :id"), {"id": batch}).scalar_one()
            for table, column in tables.items()
        }


def let_a_day_pass(ledger: Ledger) -> None:
    with ledger.working() as conn:
        conn.execute(text("UPDATE expired_jobs SET since = since - interval '25 hours'"))


def test_a_shorter_retention_hides_at_once_and_a_longer_one_shows_again(own: Ledger, database: Any) -> None:
    tenant, other = own.add_tenant(), own.add_tenant()
    old, new = run_aged(own, tenant, 10, [None] * 2), run_aged(own, tenant, 3)
    others = run_aged(own, other, 10)
    assert seen(own, tenant, old) == (True, 2, 2)
    keep_days(database, tenant, 7)
    assert seen(own, tenant, old) == (False, 0, 0)
    [job] = [row.id for row in own.jobs().values() if row.batch_id == old][:1]
    with tenant_transaction(own.api, tenant) as conn:
        assert read_job(conn, job) is None
        assert [row.id for row in batches.list_batches(conn, before=None, limit=10)] == [new]
    assert seen(own, tenant, new) == (True, 1, 1)
    assert seen(own, other, others) == (True, 1, 1)
    keep_days(database, tenant, 14)
    assert seen(own, tenant, old) == (True, 2, 2)


def test_days_count_from_the_end_of_a_batch(own: Ledger, database: Any) -> None:
    tenant = own.add_tenant()
    keep_days(database, tenant, 7)
    batch = submit_aged(own, tenant, 40, [None] * 2)
    assert seen(own, tenant, batch) == (True, 2, 0), "what waits is kept"
    end_aged(own, batch, 6)
    assert seen(own, tenant, batch) == (True, 2, 2)
    keep_retention(own.work)
    assert stored(own, batch) == {"batches": 1, "jobs": 2, "job_inputs": 2, "job_results": 2}
    own.check()


def test_one_tenants_rows_go_by_rows_where_anothers_keep_the_day(own: Ledger, database: Any) -> None:
    tenant, other = own.add_tenant(), own.add_tenant()
    make_partitions(own)
    keep_days(database, tenant, 7)
    mine, others = run_aged(own, tenant, 10, [None] * 3), run_aged(own, other, 10)
    gone = keep_retention(own.work)
    assert (gone.num_batches, gone.num_jobs, gone.partitions) == (1, 3, [])
    assert stored(own, mine) == {"batches": 0, "jobs": 0, "job_inputs": 3, "job_results": 3}
    assert seen(own, tenant, mine) == (False, 0, 0)
    assert keep_retention(own.work).num_days_by_rows == 0, "the partition has a day to go whole"
    let_a_day_pass(own)
    assert keep_retention(own.work).num_days_by_rows == 1
    assert set(stored(own, mine).values()) == {0}
    assert stored(own, others) == {"batches": 1, "jobs": 1, "job_inputs": 1, "job_results": 1}
    assert seen(own, other, others) == (True, 1, 1)
    with own.working() as conn:
        assert conn.execute(text("SELECT count(*) FROM expired_jobs")).scalar_one() == 0


def test_large_batches_and_many_small_ones_go_in_parts(
    own: Ledger, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "CHUNK", 10)
    monkeypatch.setattr(tasks, "BATCHES", 4)
    tenant, other = own.add_tenant(), own.add_tenant()
    made = [run_aged(own, tenant, 10, [None] * n) for n in (25, 3, 3, 3, 10, 4, 1)]
    kept = run_aged(own, other, 10)
    keep_days(database, tenant, 7)
    gone = keep_retention(own.work)
    assert (gone.num_batches, gone.num_jobs) == (7, 49)
    let_a_day_pass(own)
    keep_retention(own.work)
    for batch in made:
        assert set(stored(own, batch).values()) == {0}
    assert set(stored(own, kept).values()) == {1}


def test_what_was_cut_in_the_middle_is_gone_on_with(own: Ledger) -> None:
    tenant = own.add_tenant()
    batch = run_aged(own, tenant, 40, [None] * 20)
    with own.working() as conn:
        part = retention.forget_jobs(conn, [batch], after=None, limit=7)
    assert part.num_jobs == 7
    assert len(own.jobs()) == 13
    gone = keep_retention(own.work)
    assert gone.num_batches == 1
    assert own.jobs() == {}
    let_a_day_pass(own)
    keep_retention(own.work)
    assert set(stored(own, batch).values()) == {0}


def test_a_sweep_goes_with_its_batch_and_its_name_is_free_again(own: Ledger) -> None:
    tenant = own.add_tenant()

    def add() -> UUID:
        batch = batches.NewBatch(uuid7(), tenant, own.pool)
        sweep = sweeps.NewSweep(
            name="nightly",
            definition_sha256=hashlib.sha256(b"").digest(),
            sampling='{"max_tokens": 4}',
            seeds=[0],
            prompts=[sweeps.SweepPrompt("a prompt", None, None, None, None)],
            columns=[sweeps.SweepColumn(None, None)],
        )
        with tenant_transaction(own.api, tenant) as conn:
            sweeps.create_sweep(conn, batch, sweep)
        return batch.id

    with days_ago(40):
        old = add()
        with own.working() as conn:
            assert sweeps.expand(conn, old, limit=10)
    end_aged(own, old, 31)
    keep_retention(own.work)
    with own.working() as conn:
        for goes in retention.WITH_BATCH:
            left = conn.execute(text(f"SELECT count(*) FROM {goes.table} WHERE {goes.column} = :id"), {"id": old})
            assert left.scalar_one() == 0
    add()


def test_a_batchs_webhooks_go_with_it_and_events_as_they_age(own: Ledger) -> None:
    tenant = own.add_tenant()
    old, kept = run_aged(own, tenant, 40), run_aged(own, tenant, 1)
    events = {"events": ["batch.finished"], "url": "https://example.com", "secret": b"x"}
    names: dict[UUID | None, UUID] = {batch: uuid7() for batch in (old, kept, None)}
    with own.working() as conn:
        for batch, webhook in names.items():
            webhooks.add_webhook(conn, webhooks.NewWebhook(id=webhook, tenant=tenant, batch=batch, **events))
        conn.execute(
            text(
                "UPDATE webhook_deliveries SET created_at = created_at - interval '31 days' WHERE webhook_id = :webhook"
            ),
            {"webhook": names[old]},
        )
    with tenant_transaction(own.api, tenant) as conn:
        seen = conn.execute(text("SELECT webhook_id FROM webhook_deliveries")).scalars()
        assert list(seen) == [names[kept]], "what is to go is seen no more"
    keep_retention(own.work)
    with own.working() as conn:
        mine = {"tenant": tenant}
        left = conn.execute(text("SELECT id FROM webhooks WHERE tenant_id = :tenant"), mine).scalars()
        assert set(left) == {names[kept], names[None]}
        left = conn.execute(text("SELECT webhook_id FROM webhook_deliveries WHERE tenant_id = :tenant"), mine).scalars()
        assert list(left) == [names[kept]]


def test_usage_outlives_what_it_was_of(own: Ledger) -> None:
    tenant = own.add_tenant()
    run_aged(own, tenant, 40, [None] * 3)
    keep_retention(own.work)
    today = datetime.now(UTC).date()
    with tenant_transaction(own.api, tenant) as conn:
        assert [row.num_jobs for row in usage.read_usage(conn, today, today, usage.By.DAY)] == [3]


def test_every_tenants_table_has_its_place(own: Ledger) -> None:
    named = {*retention.KEPT, *(g.table for g in (*retention.WITH_BATCH, *retention.AGING))}
    with own.working() as conn:
        secured = text("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relrowsecurity")
        assert set(conn.execute(secured).scalars()) == named
        # What refers to a batch or a sweep would keep it from going.
        referring = set(
            conn.execute(
                text(
                    "SELECT conrelid::regclass::text FROM pg_constraint WHERE contype = 'f' AND confdeltype <> 'c'"
                    " AND confrelid IN ('batches'::regclass, 'sweeps'::regclass)"
                )
            ).scalars()
        )
    order = [g.table for g in retention.WITH_BATCH]
    assert referring <= set(order)
    for name in order:
        targets = {fk.column.table.name for fk in metadata.tables[name].foreign_keys} & set(order)
        assert all(order.index(target) > order.index(name) for target in targets)


def test_the_terms_of_pools_that_are_no_more_are_forgotten(own: Ledger) -> None:
    with transaction(own.work) as conn:
        for pool in ("old", "new"):
            leaders.lead(conn, pool, uuid7(), term_s=3)
        conn.execute(text("UPDATE leaders SET until = until - interval '31 days' WHERE pool = 'old'"))
        assert leaders.forget_leaders(conn, older_than_s=30 * 86_400) == 1
        assert list(conn.execute(text("SELECT pool FROM leaders")).scalars()) == ["new"]
