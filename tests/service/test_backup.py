"""Backup while jobs run, the end of the machine, and a restore elsewhere: nothing that had ended is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aging import run_aged
from api_server import ADAPTERS
from ledger import Ledger
from sqlalchemy import create_engine, text
from waiting import alive, wait_until

from medley.client import Client
from medley.client.errors import Authentication
from medley.db import recovery, workers
from medley.db.adapters import NewRevision, add_revision, hold_digest
from medley.db.connections import make_engine, tenant_transaction, transaction
from medley.db.migrate import is_current
from medley.local.backup import BackupError, restore, write_folder, write_stream
from medley.local.binaries import client_program
from medley.local.stack import LocalStack
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.store import Store

NUM_JOBS = 120
FILE = b"a file of the tenant's"


def _medley(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "medley", *args]
    return subprocess.run(command, capture_output=True, check=False, **options)


def _jobs(num_jobs: int, max_tokens: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"{'abcdefgh' * 3}=",
            "custom_id": str(i),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            **({"adapter": "add"} if i % 2 else {}),
        }
        for i in range(num_jobs)
    ]


def _audit(url: str) -> None:
    """Every job has exactly one result, and its batch counts it."""
    statements = (
        "SELECT count(*) FROM jobs WHERE state IN ('queued', 'leased')",
        "SELECT count(*) FROM jobs j LEFT JOIN job_results r ON r.job_id = j.id WHERE r.state IS DISTINCT FROM j.state",
        "SELECT count(*) FROM batches b WHERE total <> (SELECT count(*) FROM job_results r WHERE r.batch_id = b.id)",
        "SELECT count(*) FROM demand WHERE num_queued <> 0",
        # Some were at a worker when the backup was made: these have run again.
        "SELECT (count(*) = 0)::int FROM jobs WHERE attempt > 1",
    )
    engine = make_engine(url, name="audit")
    with transaction(engine) as conn:
        assert [conn.execute(text(s)).scalar_one() for s in statements] == [0] * len(statements)
        assert is_current(conn)
    engine.dispose()


@pytest.mark.faults
def test_a_backup_of_a_running_service_becomes_a_service_that_goes_on(tmp_path: Path) -> None:
    with LocalStack(tmp_path / "first", environ={"MEDLEY_MAX_NUM_SEQS": "2"}) as first:
        key = first.add_tenant("acme")
        with Client(first.url, key) as client:
            client.adapters.add("add", ADAPTERS / "add")
            file = _upload(first.url, key)
            done = client.submit_many(_jobs(10, 8))
            ended = {r.id: r.text for r in done.results(timeout=60)}
            running = client.submit_many(_jobs(NUM_JOBS, 80))
            wait_until(lambda: 0 < running.refresh().counts.ended < NUM_JOBS // 2, "some ends", 60)
            # Here and not by the command, which takes seconds to begin: some jobs are at the worker now.
            stream = io.BytesIO()
            write_stream(first.database_url(), first.data_dir / "store", stream)
        made = _medley("backup", str(tmp_path / "folder"), "--data-dir", str(first.data_dir))
        assert made.returncode == 0, made.stderr
        family = psutil.Process(first.supervisor_pid).children(recursive=True)
        first.kill_supervisor()
        wait_until(lambda: not alive(family), "the end of every process")
    shutil.rmtree(first.data_dir)

    # A folder holds the same.
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        members = tar.getnames()
    files = [str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*") if p.is_file()]
    assert sorted(members) == sorted(files)
    came = _medley("restore", "-", "--data-dir", str(tmp_path / "second"), input=stream.getvalue())
    assert came.returncode == 0, came.stderr
    assert b"revisions=1" in came.stderr

    with LocalStack(tmp_path / "second") as second, Client(second.url, key) as client:
        assert {r.id: r.text for r in client.batch(done.id).results(timeout=60)} == ended
        results = list(client.batch(running.id).results(timeout=120))
        assert len({r.id for r in results}) == NUM_JOBS
        assert {r.state for r in results} == {JobState.SUCCEEDED}
        assert client.submit("2+3=", adapter="add", max_tokens=4).result(timeout=60).text
        assert httpx.get(f"{second.url}/openai/v1/files/{file}/content", headers=_headers(key)).content == FILE
        _audit(second.database_url("medley_work"))
        _delete(second, client)


def _delete(stack: LocalStack, client: Client) -> None:
    """The tenant goes while its jobs run on a real worker, which aborts them."""
    client.submit_many(_jobs(40, 400))
    gone = _medley("tenants", "delete", "acme", "--yes", "--json", "--data-dir", str(stack.data_dir))
    assert gone.returncode == 0, gone.stderr
    certificate = json.loads(gone.stdout)
    assert certificate["num_rows"]["jobs"] == NUM_JOBS + 10 + 1 + 40
    assert certificate["num_revisions"] == 1
    with pytest.raises(Authentication):
        client.tenant()
    engine = make_engine(stack.database_url("medley_work"), name="audit")
    with transaction(engine) as conn:
        for table in ("jobs", "job_inputs", "job_results", "batches", "adapter_revisions", "tenants", "api_keys"):
            assert conn.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
    engine.dispose()
    for kind in ("sha256", "files"):
        assert list((stack.data_dir / "store" / kind).glob("*/*")) == []


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _upload(url: str, key: str) -> str:
    """The id of a file."""
    made = httpx.post(f"{url}/openai/v1/files", headers=_headers(key), files={"file": FILE}, data={"purpose": "batch"})
    return str(made.raise_for_status().json()["id"])


@pytest.fixture
def own(database: Any) -> Iterator[Ledger]:
    made = Ledger(database)
    yield made
    made.close()


def _dump(database: Any, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    url = database.url("medley_owner").replace("+psycopg", "")
    argv = [str(client_program("pg_dump")), "--format=custom", f"--file={target}", f"--dbname={url}", *options]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def _counts(database: Any) -> dict[str, int]:
    engine = create_engine(database.url("medley_owner"))
    with engine.begin() as conn:
        tables = conn.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars().all()
        counts = {t: conn.execute(text(f"SELECT count(*) FROM {t}")).scalar_one() for t in tables}
    engine.dispose()
    return counts


def test_the_plain_recipe_takes_every_row_and_a_worker_of_before_is_fenced(
    own: Ledger, database: Any, empty_database: Any, tmp_path: Path
) -> None:
    tenant = own.add_tenant()
    run_aged(own, tenant, 2, [None, own.add_revision(tenant, "own")])
    run_aged(own, tenant, 0, [None] * 3)
    own.submit(tenant, [None] * 2)
    worker = own.start_worker()
    [held] = own.claim(worker, [(tenant, 1)])
    with own.working() as conn:
        conn.execute(text("INSERT INTO leaders VALUES ('default', :id, 7, 'infinity')"), {"id": worker})

    refused = _dump(database, tmp_path / "refused.dump")
    assert refused.returncode != 0
    assert "row-level security" in refused.stderr
    taken = _dump(database, tmp_path / "medley.dump", "--enable-row-security")
    assert taken.returncode == 0, taken.stderr
    url = empty_database.url("medley_owner")
    loaded = subprocess.run(
        [
            str(client_program("pg_restore")),
            "--exit-on-error",
            "--single-transaction",
            f"--dbname={url.replace('+psycopg', '')}",
            str(tmp_path / "medley.dump"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert _counts(empty_database) == _counts(database)
    done = _medley("migrate", "--restored", env={**os.environ, "MEDLEY_DATABASE_URL": url})
    assert done.returncode == 0, done.stderr

    there = Ledger(empty_database)
    try:
        there.pool = own.pool
        with pytest.raises(workers.LeaseLost):
            there.renew(worker)
        assert there.complete(worker, [(held.job, held.attempt)]) == []
        with there.working() as conn:
            assert workers.reclaim(conn, there.pool) == 1
            assert conn.execute(text("SELECT term FROM leaders WHERE until <= clock_timestamp()")).scalar_one() == 8
        there.weights = own.weights
        another = there.start_worker()
        [again] = [c for c in there.claim(another, [(tenant, 9)]) if c.job == held.job]
        assert again.attempt == held.attempt + 1
        assert len(there.complete(another, [(again.job, again.attempt)])) == 1
        # The policies came along: another tenant sees nothing.
        with there.api.begin() as conn:
            conn.execute(text("SELECT set_config('medley.tenant', :id, true)"), {"id": str(uuid7())})
            assert conn.execute(text("SELECT count(*) FROM job_results")).scalar_one() == 0
    finally:
        there.close()


def test_a_table_that_its_owner_does_not_see_whole_is_named_and_not_dumped(database: Any, tmp_path: Path) -> None:
    engine = create_engine(database.url("medley_owner"))
    with engine.begin() as conn:
        assert recovery.hidden_tables(conn) == []
        conn.execute(text("CREATE TABLE notes (tenant_id uuid)"))
        conn.execute(text("ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"))
    engine.dispose()
    with pytest.raises(recovery.NotDumpable, match="notes"):
        write_folder(database.url("medley_owner"), tmp_path, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_what_is_no_whole_backup_is_refused_and_leaves_nothing(own: Ledger, database: Any, tmp_path: Path) -> None:
    store_dir = tmp_path / "store"
    store = Store.open(str(store_dir))
    tenant = own.add_tenant()
    digest = store.put(b"{}", ADAPTERS / "add" / "adapter_model.safetensors")
    with tenant_transaction(own.api, tenant) as conn:
        add_revision(conn, tenant, "own", NewRevision(digest, 8, 1, 1))
    good = tmp_path / "good"
    write_folder(database.url("medley_owner"), store_dir, good)

    def spoil(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(good, copy)
        return copy

    no_manifest, short, flipped, newer, no_files = map(spoil, ("a", "b", "c", "d", "e"))
    (no_manifest / "manifest.json").unlink()
    (short / "database.dump").write_bytes((good / "database.dump").read_bytes()[:-100])
    weights = flipped / "store" / "sha256" / digest[:2] / digest / "adapter_model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(spoiled)
    manifest = json.loads((good / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | {"schema": "9999"}))
    shutil.rmtree(no_files / "store")
    target = tmp_path / "target"
    for source, says in (
        (no_manifest, "no whole backup"),
        (short, "damaged"),
        (flipped, f"revision {digest}"),
        (newer, "9999"),
        (no_files, "missing"),
        (tmp_path / "nowhere", "no whole backup"),
    ):
        with pytest.raises(BackupError, match=says):
            restore(source, target)
    with pytest.raises(BackupError, match="no whole backup"):
        restore(io.BytesIO(b"x" * 2_000), target)
    assert sorted(p.name for p in target.iterdir()) == ["lock", "store"]
    assert list((target / "store").iterdir()) == []
    assert restore(good, target).digests == [digest]
    assert Store.open(str(target / "store")).has(digest)
    with pytest.raises(BackupError, match="holds a database already"):
        restore(good, target)
    # A store without a file that the database names is no source of a backup either.
    store.delete(digest)
    with pytest.raises(BackupError, match=f"revision {digest} is missing"):
        write_folder(database.url("medley_owner"), store_dir, tmp_path / "lacking")
    assert not (tmp_path / "lacking").exists()


def test_no_file_is_deleted_while_a_backup_copies(own: Ledger, database: Any) -> None:
    with recovery.snapshot(database.url("medley_owner")), own.working() as conn:
        conn.execute(text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(Exception, match="lock timeout"):
            hold_digest(conn, "0" * 64, exclusive=True)
        conn.rollback()
    with own.working() as conn:
        conn.execute(text("SET LOCAL lock_timeout = '5s'"))
        hold_digest(conn, "0" * 64, exclusive=True)
