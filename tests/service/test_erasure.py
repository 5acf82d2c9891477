"""The end of a tenant: nothing new at once, nothing left in the end, and a certificate that counts what there was."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aging import run_aged
from api_server import ADAPTERS
from click.testing import CliRunner
from ledger import Ledger, reserve
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from medley.cli import main
from medley.config import Limits, Quotas
from medley.db import audit, batches, erasure, files, flags, openai_batches, sweeps, tenants, webhooks
from medley.db.connections import tenant_transaction
from medley.db.lanes import Lane
from medley.db.models import metadata
from medley.objects import FolderObjects
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.store import Store
from medley.tasks import erase as tasks
from medley.tasks.erase import end_tenants
from medley.tasks.maintain import maintain

LIMITS = Limits()
FILES = ADAPTERS / "add"


@pytest.fixture
def own(database: Any) -> Iterator[Ledger]:
    made = Ledger(database)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def as_owner(database: Any, act: Any) -> Any:
    engine = create_engine(database.url("medley_owner"))
    try:
        with engine.begin() as connection:
            return act(connection)
    finally:
        engine.dispose()


def close(database: Any, tenant: UUID, *, grace_s: float = 0) -> None:
    as_owner(database, lambda conn: erasure.close(conn, tenant, grace_s=grace_s))


def name_of(database: Any, tenant: UUID) -> str:
    statement = text("SELECT name FROM tenants WHERE id = :id")
    name: str = as_owner(database, lambda conn: conn.execute(statement, {"id": tenant}).scalar_one())
    return name


def rows_of(ledger: Ledger, tenant: UUID) -> dict[str, int]:
    """How many rows of the tenant each table holds, by the catalogue."""
    with ledger.working() as conn:
        return {
            table.name: num_rows
            for table in erasure.read_tables(conn)
            if (
                num_rows := conn.execute(
                    text(
                        f"SELECT count(*) FROM {table.name} WHERE " + " OR ".join(f"{c} = :id" for c in table.columns)
                    ),
                    {"id": tenant},
                ).scalar_one()
            )
        }


def add_adapter(ledger: Ledger, store: Store, tenant: UUID, name: str, config: bytes) -> UUID:
    from medley.db import adapters

    digest = store.put(config, FILES / "adapter_model.safetensors")
    with tenant_transaction(ledger.api, tenant) as conn:
        new = adapters.NewRevision(digest=digest, max_rank=8, num_tiles=1, size_bytes=1)
        revision, _ = adapters.add_revision(conn, tenant, name, new)
    return revision


def fill(ledger: Ledger, store: Store, tenant: UUID) -> UUID:
    """Something in every table; returns a batch with a running job."""
    revision = add_adapter(ledger, store, tenant, "shared", b"{}")
    add_adapter(ledger, store, tenant, "own", tenant.hex.encode())
    ended = [run_aged(ledger, tenant, days, [None, revision] * 3) for days in (0, 1, 12)]
    batch = batches.NewBatch(uuid7(), tenant, ledger.pool)
    sweep = sweeps.NewSweep(
        name="nightly",
        definition_sha256=hashlib.sha256(b"").digest(),
        sampling='{"max_tokens": 4}',
        seeds=[0],
        prompts=[sweeps.SweepPrompt("a prompt", None, None, None, None)] * 3,
        columns=[sweeps.SweepColumn("own", revision)],
    )
    with tenant_transaction(ledger.api, tenant) as conn:
        sweeps.create_sweep(conn, batch, sweep)
        conn.execute(
            text("INSERT INTO idempotency_keys VALUES (:tenant, 'key', '', :id)"), {"tenant": tenant, "id": uuid7()}
        )
    ledger.submit(tenant, [None] * 6)
    worker = ledger.start_worker()
    [first, second, third] = ledger.claim(worker, [(tenant, 3)])
    ledger.release(worker, [(second.job, second.attempt)])
    ledger.complete(worker, [(third.job, third.attempt)], state=JobState.FAILED)
    hook = webhooks.NewWebhook(
        id=uuid7(), tenant=tenant, url="https://example.com", events=["batch.finished"], secret=b"x", batch=ended[0]
    )
    with ledger.working() as conn:
        conn.execute(
            text(
                "INSERT INTO crashes (tenant_id, job_id, worker_id, death_id, num_suspects)"
                " VALUES (:tenant, :id, :id, :id, 1)"
            ),
            {"tenant": tenant, "id": first.job},
        )
        conn.execute(
            text("INSERT INTO batch_forecasts VALUES (:id, :tenant, clock_timestamp(), false)"),
            {"tenant": tenant, "id": batch.id},
        )
        webhooks.add_webhook(conn, hook)
        audit.record(conn, tenant, audit.OPERATOR, "tenant.create", "somebody")
    add_openai_batch(ledger, store, tenant, revision)
    return worker


def add_openai_batch(ledger: Ledger, store: Store, tenant: UUID, revision: UUID) -> None:
    """One of a stored file, whose lines have become no jobs yet."""
    id_, data = uuid7(), b"{}\n"
    file = files.NewFile(
        id=uuid7(),
        tenant=tenant,
        purpose=files.BATCH_INPUT,
        filename="x.jsonl",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).digest(),
    )
    new = openai_batches.NewOpenAIBatch(
        endpoint="/v1/completions",
        input_file=file.id,
        completion_window="24h",
        metadata=None,
        output_expires_after_s=None,
    )
    with tenant_transaction(ledger.api, tenant) as conn:
        files.begin_file(conn, file)
        store.objects.put(file.object_key, io.BytesIO(data))
        files.finish_file(conn, file.id)
        batches.open_batch(conn, batches.NewBatch(id_, tenant, ledger.pool))
        openai_batches.create_openai_batch(conn, id_, tenant, new)
    with ledger.working() as conn:
        openai_batches.begin_jobs(conn, id_, num_requests=1, models={"own": revision}, lanes=[Lane(revision, "own", 1)])
        reserve(conn, batches.NewBatch(id_, tenant, ledger.pool), 1)


def abort_what_runs(ledger: Ledger, worker: UUID) -> int:
    """What a worker does each second."""
    with ledger.working() as conn:
        flagged = flags.flagged(conn, worker)
    assert {f.flag for f in flagged} <= {flags.Flag.CANCEL}
    ended = ledger.complete(worker, [(f.job, f.attempt) for f in flagged], state=JobState.CANCELLED)
    return len(ended)


def _root(store: Store) -> Path:
    assert isinstance(store.objects, FolderObjects)
    return store.objects.root


def test_every_tenants_table_is_known_to_the_erasure_in_an_order_that_references_allow(own: Ledger) -> None:
    with own.working() as conn:
        found = erasure.read_tables(conn)
        secured = text("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relrowsecurity")
        assert {t.name for t in found} == set(conn.execute(secured).scalars())
    order = [t.name for t in found]
    assert order[-1] == "tenants"
    for table in metadata.sorted_tables:
        for key in table.foreign_keys:
            if {table.name, key.column.table.name} <= set(order) and key.column.table is not table:
                assert order.index(table.name) < order.index(key.column.table.name)
    assert order.index("batches") < min(order.index(t) for t in ("jobs", "job_inputs", "job_results", "crashes"))


def test_a_table_whose_rows_are_nobodys_is_refused_before_anything_is_erased(
    own: Ledger, database: Any, store: Store
) -> None:
    tenant = own.add_tenant()
    close(database, tenant)

    def add_table(conn: Connection) -> None:
        conn.execute(text("CREATE TABLE notes (id uuid PRIMARY KEY, whose uuid)"))
        conn.execute(text("ALTER TABLE notes ENABLE ROW LEVEL SECURITY"))

    as_owner(database, add_table)
    with pytest.raises(erasure.NotErasable, match="notes"):
        end_tenants(own.work, store)
    assert name_of(database, tenant)


def test_what_anothers_rows_need_is_not_erased_and_the_constraint_is_named(
    own: Ledger, database: Any, store: Store
) -> None:
    tenant, other = own.add_tenant(), own.add_tenant()
    add_adapter(own, store, tenant, "own", b"{}")

    def refer(conn: Connection) -> None:
        conn.execute(text("CREATE TABLE uses (tenant_id uuid, adapter uuid CONSTRAINT used REFERENCES adapters (id))"))
        conn.execute(text("ALTER TABLE uses ENABLE ROW LEVEL SECURITY"))
        conn.execute(text("INSERT INTO uses SELECT :id, id FROM adapters"), {"id": other})

    as_owner(database, refer)
    close(database, tenant)
    with pytest.raises(erasure.NotErasable, match="used"):
        end_tenants(own.work, store)


def test_a_table_that_comes_later_is_erased_too(own: Ledger, database: Any, store: Store) -> None:
    tenant, other = own.add_tenant(), own.add_tenant()

    def add_tables(conn: Connection) -> None:
        conn.execute(text("CREATE TABLE notes (id serial PRIMARY KEY, owner uuid NOT NULL REFERENCES tenants (id))"))
        conn.execute(text("CREATE TABLE lines (note integer REFERENCES notes (id), tenant_id uuid NOT NULL)"))
        for table in ("notes", "lines"):
            conn.execute(text(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"))
            conn.execute(text(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)"))
        for whose in (tenant, other):
            conn.execute(text("INSERT INTO notes (owner) VALUES (:id)"), {"id": whose})
            conn.execute(text("INSERT INTO lines SELECT max(id), :id FROM notes"), {"id": whose})

    as_owner(database, add_tables)
    close(database, tenant)
    end_tenants(own.work, store)
    for table, column in (("notes", "owner"), ("lines", "tenant_id")):
        statement = text(f"SELECT {column} FROM {table}")
        assert as_owner(database, lambda conn, s=statement: list(conn.execute(s).scalars())) == [other]


def test_all_of_a_tenant_is_erased_and_nothing_of_another(own: Ledger, database: Any, store: Store) -> None:
    tenant, other = own.add_tenant(), own.add_tenant()
    fill(own, store, other)
    worker = fill(own, store, tenant)
    own.fold()
    others = rows_of(own, other)
    num_files = len(list((_root(store) / "sha256").glob("*/*/*.safetensors")))
    close(database, tenant)
    end_tenants(own.work, store)
    with own.working() as conn:
        assert erasure.num_leased(conn, tenant) == 1, "what runs is waited for"
        waiting = text("SELECT count(*) FROM jobs WHERE state = 'queued' AND tenant_id = :id")
        assert conn.execute(waiting, {"id": tenant}).scalar_one() == 0
    assert abort_what_runs(own, worker) == 1
    before = rows_of(own, tenant)
    # `checkpoints` and `demand` go with the jobs' ends, or come to nothing; limits and grants are not everybody's.
    assert set(before) | {"checkpoints", "tenant_limits", "adapter_grants"} == {
        table.name for table in metadata.sorted_tables
    } - {
        "workers",
        "worker_batches",
        "fleet_log",
        "leaders",
        "expired_jobs",
        "erasures",
    }
    end_tenants(own.work, store)
    assert rows_of(own, tenant) == {}
    assert rows_of(own, other) == others
    with own.working() as conn:
        [certificate] = [c for c in erasure.read_certificates(conn) if c.tenant == tenant]
    assert certificate.finished_at is not None
    assert certificate.num_rows == before
    assert (certificate.num_revisions, certificate.num_shared) == (1, 1)
    assert len(list((_root(store) / "sha256").glob("*/*/*.safetensors"))) == num_files - 1
    assert list(store.objects.keys(files.object_prefix(tenant))) == []
    assert len(list(store.objects.keys(files.object_prefix(other)))) == 1
    end_tenants(own.work, store)
    with own.working() as conn:
        assert [c for c in erasure.read_certificates(conn) if c.tenant == tenant] == [certificate]


class Cut(Exception):
    """The process was killed here."""


@pytest.mark.parametrize("after", [0, 3, 8, 15, 22])
def test_cut_anywhere_it_goes_on_and_counts_each_row_once(
    own: Ledger, database: Any, store: Store, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(tasks, "CHUNK", 4)
    monkeypatch.setattr(tasks, "BATCHES", 2)
    tenant = own.add_tenant()
    worker = fill(own, store, tenant)
    close(database, tenant)
    tasks.stop(own.work, tenant)
    abort_what_runs(own, worker)
    before = rows_of(own, tenant)
    calls = 0

    def cut(act: Any) -> Any:
        def acting(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            result = act(*args, **named)
            if calls == after + 1:
                raise Cut  # its transaction comes to nothing
            return result

        return acting

    with monkeypatch.context() as patch:
        for name in ("begin", "erase_jobs", "erase_table", "note_files", "finish"):
            patch.setattr(erasure, name, cut(getattr(erasure, name)))
        try:
            end_tenants(own.work, store)
        except Cut:
            end_tenants(own.work, store)
    with own.working() as conn:
        [certificate] = erasure.read_certificates(conn)
    assert rows_of(own, tenant) == {}
    assert certificate.num_rows == before
    assert certificate.num_revisions == 2
    assert certificate.finished_at is not None
    assert list((_root(store) / "sha256").glob("*/*/*.safetensors")) == []


def test_what_is_being_submitted_while_it_ends_is_refused_or_erased(own: Ledger, database: Any, store: Store) -> None:
    tenant = own.add_tenant()
    made: list[UUID] = []
    refused = threading.Event()

    def submit() -> None:
        while True:
            try:
                made.append(own.submit(tenant, [None] * 3))
            except (batches.TenantClosing, ProgrammingError, IntegrityError):  # the last: its row went meanwhile
                refused.set()
                return

    submitter = threading.Thread(target=submit)
    submitter.start()
    while len(made) < 5:
        assert submitter.is_alive()
    close(database, tenant)
    end_tenants(own.work, store)
    submitter.join(timeout=30)
    assert refused.is_set()
    end_tenants(own.work, store)
    assert rows_of(own, tenant) == {}
    with own.working() as conn:
        [certificate] = erasure.read_certificates(conn)
        orphans = {
            table: conn.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
            for table in ("jobs", "job_inputs", "job_results")
        }
    assert set(orphans.values()) == {0}
    assert certificate.num_rows["jobs"] == 3 * len(made)


def test_a_deletion_with_grace_stops_now_erases_later_and_can_be_called_off(
    own: Ledger, database: Any, store: Store
) -> None:
    tenant = own.add_tenant()
    name = name_of(database, tenant)
    key = as_owner(database, lambda conn: tenants.add_tenant(conn, name))
    batch = own.submit(tenant, [None] * 2)
    close(database, tenant, grace_s=3_600)
    maintain(own.work, store)
    assert {row.state for row in own.jobs().values() if row.batch_id == batch} == {"cancelled"}
    with own.api.begin() as conn:
        assert tenants.authenticate(conn, key, Quotas()) is None
    with pytest.raises(batches.TenantClosing):
        own.submit(tenant, [None])
    with pytest.raises(batches.TenantClosing):
        as_owner(database, lambda conn: tenants.add_tenant(conn, name))
    with pytest.raises(ProgrammingError), own.working() as conn:
        erasure.erase_table(conn, tenant, erasure.TenantTable("jobs", ("tenant_id",)))
    assert as_owner(database, lambda conn: erasure.keep(conn, tenant))
    own.submit(tenant, [None])
    with own.api.begin() as conn:
        assert tenants.authenticate(conn, key, Quotas()) is None, "keys stay revoked"
        new = as_owner(database, lambda c: tenants.add_tenant(c, name))
        found = tenants.authenticate(conn, new, Quotas())
        assert found is not None
        assert found.tenant.id == tenant
    own.check()


def test_the_same_name_can_be_used_again_by_another_tenant(own: Ledger, database: Any, store: Store) -> None:
    tenant = own.add_tenant()
    name = name_of(database, tenant)
    close(database, tenant)
    end_tenants(own.work, store)
    as_owner(database, lambda conn: tenants.add_tenant(conn, name))
    assert as_owner(database, lambda conn: erasure.find_tenant(conn, name)) != tenant


def test_the_operators_commands_set_days_delete_and_keep(
    own: Ledger, database: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDLEY_DATABASE_URL", database.url("medley_owner"))
    monkeypatch.setenv("MEDLEY_STORE_URL", _root(store).as_uri())
    tenant = own.add_tenant()
    name = name_of(database, tenant)

    def run(*args: str, typed: str | None = None) -> Any:
        return CliRunner().invoke(main, ["tenants", *args], input=typed)

    assert run("retention", name, "7").output == f"{name}\t7 days\n"
    assert run("retention", "nobody", "7").exit_code == 2
    assert run("retention", name, "0").exit_code == 2
    run_aged(own, tenant, 3)
    assert "nothing was done" in run("delete", name, typed="other\n").output
    assert "days off" in run("delete", name, "--yes", "--grace-days", "2").output
    assert "is being deleted" in run("add", name).output
    assert run("keep", name).output == f"{name} is kept\n"
    done = run("delete", name, typed=f"{name}\n")
    assert done.exit_code == 0, done.output
    assert "1  job_results" in done.output
    assert rows_of(own, tenant) == {}
    assert run("delete", name, "--yes").exit_code == 2
