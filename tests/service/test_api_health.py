"""Health, workers, and what the database itself refuses to the API's role."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from api_server import Api, running_api
from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError
from waiting import alive, wait_until

from medley.config import Limits
from medley.db import workers
from medley.db.connections import tenant_transaction, transaction
from medley.local.embedded import EmbeddedServers
from medley.spec.ids import uuid7
from medley.spec.wire import EngineStats

LIMITS = Limits()


def test_a_service_that_can_serve_says_so_to_anyone(api: Api) -> None:
    assert api.anonymous.get("/livez").status_code == 200
    expected = {"postgres": True, "migrations": True, "redis": True, "model": True}
    wait_until(lambda: api.anonymous.get("/readyz").json() == expected)  # Redis may miss the second that it is given
    assert api.anonymous.get("/readyz").status_code == 200


def test_it_is_unready_on_an_old_schema(api: Api) -> None:
    newest = api.owner(lambda conn: conn.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
    api.owner(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '0000'")))
    try:
        ready = api.anonymous.get("/readyz")
        assert (ready.status_code, ready.json()["migrations"]) == (503, False)
    finally:
        api.owner(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": newest}))


def test_without_postgres_it_lives_and_is_unready_and_recovers(
    embedded: EmbeddedServers, database: Any, store_url: str
) -> None:
    with running_api(database, embedded.redis_url, store_url) as api:
        tenant = api.as_tenant()
        assert tenant.get("/v1/tenant").status_code == 200
        backends = psutil.Process(embedded.pid("postgres")).children()
        embedded.kill("postgres")
        wait_until(lambda: not alive(backends), "the end of its backends, which answer until they notice")
        try:
            assert api.anonymous.get("/livez").status_code == 200
            assert api.anonymous.get("/readyz").status_code == 503
            refused = tenant.post("/v1/jobs", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            assert refused.headers["retry-after"]
        finally:
            embedded.start_postgres()
        assert tenant.post("/v1/jobs", json={"prompt": "a"}).status_code == 201


def test_workers_are_shown_without_what_belongs_to_tenants(api: Api) -> None:
    worker = api.ledger.start_worker()
    resident = (uuid7(), uuid7())
    with api.ledger.working() as conn:
        workers.renew(
            conn,
            worker,
            lease_s=60,
            state=workers.WorkerState.ACTIVE,
            room=workers.Room(max_num_seqs=8),
            resident=resident,
            stats=EngineStats(steps=3, resident=resident),
        )
    mine = next(w for w in api.as_tenant().get("/v1/workers").json()["workers"] if w["id"] == f"worker_{worker.hex}")
    assert (mine["state"], mine["max_num_seqs"], mine["num_leased"], mine["num_resident"]) == ("active", 8, 0, 2)
    assert mine["stats"]["steps"] == 3
    assert "resident" not in mine["stats"]


def test_a_request_that_is_no_http_does_not_harm_the_next(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"NONSENSE\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert api.anonymous.get("/livez").status_code == 200


def test_a_chunked_body_over_a_raw_socket_is_cut_at_the_limit(database: Any, redis_url: str, store_url: str) -> None:
    with running_api(database, redis_url, store_url, limits=Limits(max_body_bytes=1000)) as api:
        host, port = api.url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key('acme')}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(head.encode())
            raw.sendall(b"3e9\r\n" + b"x" * 1001 + b"\r\n")
            answer = raw.recv(10_000)
        assert b"413" in answer.split(b"\r\n")[0]


TENANT_TABLES = [
    "tenants",
    "api_keys",
    "adapters",
    "adapter_revisions",
    "batches",
    "sweeps",
    "sweep_prompts",
    "sweep_columns",
    "jobs",
    "job_inputs",
    "job_results",
    "checkpoints",
    "idempotency_keys",
    "demand",
    "demand_sums",
    "demand_changes",
    "tenant_counters",
    "counter_sums",
    "counter_changes",
    "crashes",
]


def test_the_database_shows_the_apis_role_nothing_without_a_tenant_and_only_its_own_with_one(api: Api) -> None:
    batch = api.as_tenant().post("/v1/batches", json={"jobs": [{"prompt": "a"}]}).json()
    api.finish(batch["id"])
    api.upload("a")
    api.as_tenant().post("/v1/sweeps", json={"name": "s", "prompts": ["a"], "adapters": ["*"]})
    api.as_tenant("globex")
    for table in TENANT_TABLES:
        count = text(f"SELECT count(*) FROM {table}")
        with transaction(api.ledger.api) as conn:
            assert conn.execute(count).scalar_one() == 0, table
        with tenant_transaction(api.ledger.api, api.tenant_id("globex")) as conn:
            own = 1 if table in ("tenants", "api_keys") else 0
            assert conn.execute(count).scalar_one() == own, table


def as_api(api: Api, tenant: UUID | None) -> AbstractContextManager[Connection]:
    """A transaction as the API's role, with a tenant or without."""
    return transaction(api.ledger.api) if tenant is None else tenant_transaction(api.ledger.api, tenant)


def test_the_database_refuses_the_apis_role_rows_of_another_tenant(api: Api) -> None:
    api.as_tenant()
    api.as_tenant("globex")
    mine, theirs = api.tenant_id("acme"), api.tenant_id("globex")
    inserts = [
        "INSERT INTO batches (id, tenant_id, pool, total) VALUES (:id, :tenant, 'p', 1)",
        "INSERT INTO jobs (id, tenant_id, batch_id, pool, priority, est_tokens) VALUES (:id, :tenant, :id, 'p', 1, 1)",
        "INSERT INTO adapters (id, tenant_id, name) VALUES (:id, :tenant, 'x')",
        "INSERT INTO demand_changes (pool, lane, priority, tenant_id, num_queued) VALUES ('p', :id, 1, :tenant, 1)",
    ]
    for statement in inserts:
        for tenant in (mine, None):
            with (
                pytest.raises(ProgrammingError, match="row-level security"),
                as_api(api, tenant) as conn,
            ):
                conn.execute(text(statement), {"id": uuid7(), "tenant": theirs})


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE workers SET lease_until = clock_timestamp()",
        "INSERT INTO leaders (pool, holder, term, until) SELECT 'p', id, 1, clock_timestamp() FROM workers",
        "UPDATE tenants SET weight = 100",
        "UPDATE api_keys SET secret_sha256 = ''",
        "UPDATE api_keys SET scopes = '{admin}'",
        "DELETE FROM api_keys",
        "INSERT INTO tenant_limits (tenant_id, queued_jobs) SELECT id, 1 FROM tenants",
        "UPDATE audit_log SET action = ''",
        "DELETE FROM audit_log",
        "DELETE FROM jobs",
        "UPDATE job_results SET text = ''",
        "UPDATE counter_sums SET service = 0",
        "INSERT INTO counter_changes (pool, tenant_id, service) SELECT 'p', id, -1 FROM tenants",
        "UPDATE demand_sums SET num_queued = 0",
        "DELETE FROM demand_changes",
        "SET ROLE medley_work",
        "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY",
    ],
)
def test_the_apis_role_cannot_do_what_is_not_the_apis(api: Api, statement: str) -> None:
    api.as_tenant()
    with (
        pytest.raises(ProgrammingError, match=r"permission denied|must be owner"),
        tenant_transaction(api.ledger.api, api.tenant_id("acme")) as conn,
    ):
        conn.execute(text(statement))


def test_a_stop_lets_waiters_answer_at_once(database: Any, redis_url: str, store_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running_api(database, redis_url, store_url) as api:
            job = api.as_tenant().post("/v1/jobs", json={"prompt": "a"}).json()["id"]
            waiting = pool.submit(httpx.get, f"{api.url}/v1/jobs/{job}?wait=60", headers=api.headers(), timeout=60)
            wait_until(lambda: api.num_waiting() == 1)
            started = time.monotonic()
        assert waiting.result(timeout=20).json()["state"] == "queued"
        assert time.monotonic() - started < 8
