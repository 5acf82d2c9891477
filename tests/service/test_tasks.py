"""The CPU tasks on real rows, and their process on a real Redis."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ledger import Ledger, reserve
from receiver import Receiver, receiving
from sqlalchemy import text
from waiting import wait_until

from medley.db import batches, chores, crashes, sweeps, webhooks
from medley.db.connections import tenant_transaction
from medley.rings import EXPAND_TASK, MAINTAIN_TASK, Ringer
from medley.spec.ids import uuid7
from medley.store import Store
from medley.tasks.deliver import Deliverer
from medley.tasks.expand import Expander
from medley.tasks.maintain import maintain


@pytest.fixture
def ringer(redis_url: str) -> Iterator[Ringer]:
    made = Ringer(redis_url)
    yield made
    made.close()


def add_sweep(ledger: Ledger, num_prompts: int, *, num_seeds: int = 1) -> tuple[UUID, UUID]:
    """(tenant, sweep) of prompts on the base and one adapter."""
    tenant = ledger.add_tenant()
    batch = batches.NewBatch(uuid7(), tenant, ledger.pool)
    sweep = sweeps.NewSweep(
        name="sweep",
        definition_sha256=hashlib.sha256(b"").digest(),
        sampling='{"max_tokens": 4}',
        seeds=list(range(num_seeds)),
        prompts=[sweeps.SweepPrompt(f"prompt {i}", None, None, None, None) for i in range(num_prompts)],
        columns=[
            sweeps.SweepColumn(None, None),
            sweeps.SweepColumn("own", ledger.add_revision(tenant, "own")),
        ],
    )
    with tenant_transaction(ledger.api, tenant) as conn:
        sweeps.create_sweep(conn, batch, sweep)
        reserve(conn, batch, sweep.num_cells, num_bytes=sweeps.prompt_bytes(sweep.prompts))
    return tenant, batch.id


def tell(ledger: Ledger, receiver: Receiver) -> UUID:
    """A batch of a new tenant ends, of which `receiver` is to be told. Returns the delivery."""
    tenant = ledger.add_tenant()
    new = webhooks.NewWebhook(
        id=uuid7(), tenant=tenant, url=receiver.url, events=["batch.finished"], secret=b"a secret"
    )
    with tenant_transaction(ledger.api, tenant) as conn:
        webhooks.add_webhook(conn, new)
    ledger.flag(tenant, ledger.submit(tenant, [None]), "cancel")
    with ledger.working() as conn:
        statement = text("SELECT id FROM webhook_deliveries WHERE webhook_id = :id")
        delivery: UUID = conn.execute(statement, {"id": new.id}).scalar_one()
    return delivery


def cells(ledger: Ledger, sweep: UUID) -> list[tuple[int, int, int]]:
    statement = "SELECT prompt_idx, seed, column_idx FROM job_inputs WHERE batch_id = :id ORDER BY job_id"
    with ledger.working() as conn:
        return [tuple(row) for row in conn.execute(text(statement), {"id": sweep})]  # type: ignore[misc]


def test_a_sweep_becomes_one_job_a_cell_prompt_by_prompt(ledger: Ledger, ringer: Ringer) -> None:
    _, sweep = add_sweep(ledger, 3, num_seeds=2)
    Expander(ledger.work, ringer, ledger.pool).expand(sweep)
    assert cells(ledger, sweep) == [(p, s, c) for p in range(3) for s in range(2) for c in range(2)]
    assert sum(ledger.demand().values()) == 12
    with ledger.working() as conn:
        assert sweep not in sweeps.read_unexpanded(conn)
    ledger.check()


def test_an_expansion_that_was_cut_goes_on_where_it_stood(
    ledger: Ledger, ringer: Ringer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.tasks.expand.CELLS_A_CHUNK", 4)
    _, sweep = add_sweep(ledger, 5)
    chunks: list[None] = []
    cut = Expander(
        ledger.work, ringer, ledger.pool, on_chunk=lambda: chunks.append(None), should_stop=lambda: len(chunks) == 1
    )
    cut.expand(sweep)
    assert len(cells(ledger, sweep)) == 4
    Expander(ledger.work, ringer, ledger.pool).expand(sweep)
    assert cells(ledger, sweep) == [(p, 0, c) for p in range(5) for c in range(2)]
    ledger.check()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_every_cell_becomes_one_job_however_large_a_chunk_is(ledger: Ledger, chunk: int) -> None:
    tenant = ledger.add_tenant()
    columns = ["a", "b", "c", None]
    only = [None, "b", "b", None, "a", None, "c", "c", "c", None]
    sweep = sweeps.NewSweep(
        name="sweep",
        definition_sha256=hashlib.sha256(b"").digest(),
        sampling='{"max_tokens": 4}',
        seeds=[5, 3],
        prompts=[sweeps.SweepPrompt("prompt", None, None, None, adapter) for adapter in only],
        columns=[sweeps.SweepColumn(name, name and ledger.add_revision(tenant, name)) for name in columns],
    )
    batch = batches.NewBatch(uuid7(), tenant, ledger.pool)
    with tenant_transaction(ledger.api, tenant) as conn:
        sweeps.create_sweep(conn, batch, sweep)
        reserve(conn, batch, sweep.num_cells, num_bytes=sweeps.prompt_bytes(sweep.prompts))
    is_whole = False
    while not is_whole:
        with ledger.working() as conn:
            is_whole = sweeps.expand(conn, batch.id, limit=chunk)
        assert is_whole or len(cells(ledger, batch.id)) % chunk == 0, "a chunk is full but for the last"
    assert cells(ledger, batch.id) == [
        (prompt, seed, column)
        for prompt, own in enumerate(only)
        for seed in (5, 3)
        for column, name in enumerate(columns)
        if own is None or name in (own, None)
    ]
    ledger.check()


def test_a_look_expands_a_sweep_that_does_not_move(ledger: Ledger, ringer: Ringer) -> None:
    _, sweep = add_sweep(ledger, 2)
    expander = Expander(ledger.work, ringer, ledger.pool)
    expander.look()
    assert cells(ledger, sweep) == []
    expander.look()
    assert len(cells(ledger, sweep)) == 4


def test_a_paused_sweep_expands_into_held_jobs_and_a_cancelled_one_into_ended_ones(
    ledger: Ledger, ringer: Ringer
) -> None:
    paused_by, paused = add_sweep(ledger, 2)
    cancelled_by, cancelled = add_sweep(ledger, 2)
    ledger.flag(paused_by, paused, "pause")
    ledger.flag(cancelled_by, cancelled, "cancel")
    expander = Expander(ledger.work, ringer, ledger.pool)
    expander.expand(paused)
    expander.expand(cancelled)
    rows = ledger.jobs().values()
    assert {row.is_held for row in rows if row.batch_id == paused} == {True}
    assert {row.state for row in rows if row.batch_id == cancelled} == {"cancelled"}
    assert ledger.demand() == {}
    ledger.check()


def test_cells_of_an_adapter_that_was_quarantined_meanwhile_end_at_once(ledger: Ledger, ringer: Ringer) -> None:
    _, sweep = add_sweep(ledger, 2)
    with ledger.working() as conn:
        revision = next(c.revision_id for c in sweeps.read_columns(conn, sweep) if c.revision_id is not None)
        crashes.quarantine(conn, revision)
    Expander(ledger.work, ringer, ledger.pool).expand(sweep)
    states = [(row.state, row.revision_id) for row in ledger.jobs().values()]
    assert sorted(states, key=str) == sorted([("failed", revision), ("queued", None)] * 2, key=str)
    ledger.check()


def test_an_unknown_sweep_is_no_fault(ledger: Ledger, ringer: Ringer) -> None:
    Expander(ledger.work, ringer, ledger.pool).expand(uuid7())


def test_maintenance_forgets_the_old_and_keeps_the_rest(ledger: Ledger, tmp_path: Path) -> None:
    tenant = ledger.add_tenant()
    old, recent = ledger.start_worker(), ledger.start_worker()
    with ledger.working() as conn:
        for key, age in (("old", "25 hours"), ("recent", "1 hour")):
            conn.execute(
                text(
                    "INSERT INTO idempotency_keys (tenant_id, key, request_sha256, resource_id, created_at)"
                    " VALUES (:tenant, :key, '', :id, clock_timestamp() - CAST(:age AS interval))"
                ),
                {"tenant": tenant, "key": key, "id": uuid7(), "age": age},
            )
        for days in (31, 29):
            conn.execute(
                text(
                    "INSERT INTO crashes (tenant_id, job_id, worker_id, death_id, num_suspects, created_at)"
                    " VALUES (:tenant, :id, :id, :id, 1, clock_timestamp() - make_interval(days => :days))"
                ),
                {"tenant": tenant, "id": uuid7(), "days": days},
            )
        conn.execute(
            text(
                "UPDATE workers SET state = 'gone', changed_at = clock_timestamp() -"
                " CASE WHEN id = :old THEN interval '25 hours' ELSE interval '1 hour' END WHERE pool = :pool"
            ),
            {"old": old, "pool": ledger.pool},
        )
    ledger.submit(tenant, [None])
    ledger.flag(tenant, ledger.submit(tenant, [ledger.add_revision(tenant, "own")]), "cancel")
    ledger.fold()
    (tmp_path / "tmp" / "cut").mkdir(parents=True)
    os.utime(tmp_path / "tmp" / "cut", (0, 0))
    maintain(ledger.work, Store.open(str(tmp_path)))
    assert list((tmp_path / "tmp").iterdir()) == []
    with ledger.working() as conn:
        keys = conn.execute(text("SELECT key FROM idempotency_keys WHERE tenant_id = :id"), {"id": tenant}).scalars()
        assert list(keys) == ["recent"]
        ages = text("SELECT extract(days FROM clock_timestamp() - created_at)::int FROM crashes WHERE tenant_id = :id")
        assert list(conn.execute(ages, {"id": tenant}).scalars()) == [29]
        kept = conn.execute(text("SELECT id FROM workers WHERE pool = :pool"), {"pool": ledger.pool}).scalars()
        assert list(kept) == [recent]
        lanes = conn.execute(text("SELECT lane FROM demand_sums WHERE pool = :pool"), {"pool": ledger.pool}).scalars()
        assert list(lanes) == [tenant]
    ledger.check()


def test_an_event_is_rung_once_a_due_time_and_one_without_a_message_is_found(ledger: Ledger) -> None:
    with receiving() as receiver:
        delivery = tell(ledger, receiver)
        with ledger.working() as conn:
            assert chores.read_due(conn, ledger.pool).deliver
            assert delivery in webhooks.due_rings(conn)
            assert webhooks.due_rings(conn) == []
            assert not chores.read_due(conn, ledger.pool).deliver
        deliverer = Deliverer(ledger.work, allow_loopback=True)
        deliverer.look()
        wait_until(lambda: len(receiver.received) == 1)
        deliverer.close()


def test_an_event_never_goes_to_this_machine_where_the_operator_does_not_allow_it(ledger: Ledger) -> None:
    with receiving() as receiver:
        delivery = tell(ledger, receiver)
        deliverer = Deliverer(ledger.work)
        assert deliverer.deliver(delivery) is None
        deliverer.close()
        assert receiver.received == []
    with ledger.working() as conn:
        statement = text("SELECT state, error FROM webhook_deliveries WHERE id = :id")
        row = conn.execute(statement, {"id": delivery}).one()
    assert (row.state, row.error) == ("pending", "not sent: wanted a URL that begins with https://")


@pytest.fixture
def process(ledger: Ledger, module_database: Any, redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = os.environ | {
        "MEDLEY_DATABASE_URL": module_database.url("medley_work"),
        "MEDLEY_REDIS_URL": redis_url,
        "MEDLEY_STORE_URL": "file:///nowhere",
        "MEDLEY_POOL": ledger.pool,
        "MEDLEY_WEBHOOK_LOOPBACK": "true",
    }
    program = (
        "from medley import logs; from medley.config import Settings; from medley.tasks.worker import run;"
        " settings = Settings.from_env(); logs.configure('tasks', settings); run(settings)"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=environ) as running:
        yield running
        running.kill()


@pytest.mark.faults
def test_the_process_runs_tasks_without_redis_too_and_ends_on_sigterm(
    ledger: Ledger, ringer: Ringer, process: subprocess.Popen[bytes], embedded: Any
) -> None:
    _, first = add_sweep(ledger, 3)
    ringer.send_task(EXPAND_TASK, first.hex)
    ringer.send_task(MAINTAIN_TASK)
    wait_until(lambda: len(cells(ledger, first)) == 6)

    with receiving() as receiver:
        tell(ledger, receiver)
        wait_until(lambda: len(receiver.received) == 1)
    embedded.stop("redis")
    try:
        _, second = add_sweep(ledger, 3)
        wait_until(lambda: len(cells(ledger, second)) == 6)
    finally:
        embedded.start_redis()

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    ledger.check()
