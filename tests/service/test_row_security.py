"""Beneath the query filter: whatever a statement of the API says, the database gives it one tenant's rows alone.

The tables come from the catalogue, so a table that is added later is tried as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from api_server import Api, adapter_files
from openai_service import client_of, close_clients, completion_line, create, make_tasks
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from test_api_access import CLOSED, Route

from medley.api import sql
from medley.config import Limits
from medley.db import crashes, results
from medley.db.connections import tenant_transaction, transaction
from medley.db.quotas import set_limits
from medley.spec.ids import parse_id
from medley.tasks.expand import Expander

LIMITS = Limits()
WEBHOOK = {"url": "https://example.com", "events": ["batch.finished"]}

# What a column that must not be null holds in a made-up row.
_MADE_UP = {"uuid": "gen_random_uuid()", "text": "'x'", "bytea": "'x'", "jsonb": "'{}'", "boolean": "false"}
_MADE_UP |= dict.fromkeys(("smallint", "integer", "bigint", "real", "double precision"), "1")
_MADE_UP |= {"timestamp with time zone": "clock_timestamp()", "ARRAY": "'{}'"}


class Tables:
    """Every table whose rows belong to tenants, each with a row of acme's."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.acme, self.globex = api.tenant_id("acme"), api.tenant_id("globex")
        statement = "SELECT relname FROM pg_class WHERE relrowsecurity AND relkind IN ('r', 'p') AND NOT relispartition"
        self.names = sorted(api.owner(lambda conn: list(conn.execute(text(statement)).scalars())))
        for name in self.names:
            if not self.rows(name):
                api.owner(lambda conn, name=name: self._make_up(conn, name))

    def owner_of(self, table: str) -> str:
        """The column that says whose a row is."""
        return "id" if table == "tenants" else "tenant_id"

    def rows(self, table: str) -> list[str]:
        """Acme's rows as JSON, past row-level security."""

        def read(conn: Connection) -> list[str]:
            with unforced(conn, table):
                # When a key was last used is noted once a minute, whatever else happens.
                whole = f"SELECT (to_jsonb(t) - 'last_used_at')::text FROM {table} t"
                statement = f"{whole} WHERE {self.owner_of(table)} = :acme ORDER BY 1"
                return list(conn.execute(text(statement), {"acme": self.acme}).scalars())

        found: list[str] = self.api.owner(read)
        return found

    def snapshot(self) -> dict[str, list[str]]:
        return {name: self.rows(name) for name in self.names}

    def columns(self, conn: Connection, table: str) -> list[Any]:
        """Those that an INSERT may name."""
        statement = (
            "SELECT column_name, data_type, is_nullable = 'NO' AND column_default IS NULL AS is_needed"
            " FROM information_schema.columns WHERE table_name = :table AND is_generated = 'NEVER'"
            " AND is_identity = 'NO'"
        )
        return list(conn.execute(text(statement), {"table": table}))

    def _make_up(self, conn: Connection, table: str) -> None:
        """A row of a table that these tests do not know."""
        checks = " ".join(
            conn.execute(
                text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = CAST(:t AS regclass)"),
                {"t": table},
            ).scalars()
        )
        values = {self.owner_of(table): f"'{self.acme}'"}
        for column in self.columns(conn, table):
            if column.is_needed and column.column_name not in values:
                allowed = re.search(rf"\({column.column_name} = ANY \(ARRAY\['(\w+)'", checks)
                values[column.column_name] = f"'{allowed[1]}'" if allowed else _MADE_UP[column.data_type]
        for column_name, other, key in re.findall(r"FOREIGN KEY \((\w+)\) REFERENCES (\w+)\((\w+)\)", checks):
            if column_name in values and column_name != "tenant_id":
                values[column_name] = (
                    f"(SELECT {key} FROM {other} WHERE {self.owner_of(other)} = '{self.acme}' LIMIT 1)"
                )
                conn.execute(text(f"ALTER TABLE {other} NO FORCE ROW LEVEL SECURITY"))
        with unforced(conn, table):
            names, made_up = ", ".join(values), ", ".join(values.values())
            conn.execute(text(f"INSERT INTO {table} ({names}) VALUES ({made_up})"))
        for other in re.findall(r"FOREIGN KEY \(\w+\) REFERENCES (\w+)\(", checks):
            conn.execute(text(f"ALTER TABLE {other} FORCE ROW LEVEL SECURITY"))


@contextmanager
def unforced(conn: Connection, table: str) -> Iterator[None]:
    """The owner sees every row within the block."""
    conn.execute(text(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY"))
    yield
    conn.execute(text(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY"))


@pytest.fixture(scope="module")
def tables(api: Api) -> Tables:
    acme, _, _ = (api.as_tenant(name) for name in ("acme", "globex", "initech"))
    assert acme.put("/v1/adapters/mine", files=adapter_files()).status_code == 201
    assert acme.post("/v1/adapters/mine/grants", json={"tenant": "initech"}).status_code == 201
    ended = acme.post("/v1/batches", json={"jobs": [{"prompt": "a"}]}, headers={"Idempotency-Key": "k"}).json()
    api.finish(ended["id"])
    acme.post("/v1/sweeps", json={"name": "s", "prompts": ["a"], "adapters": ["*"]})
    _expand_all(api)
    assert acme.post("/v1/webhooks", json=WEBHOOK).status_code == 201
    create(client_of(api, "acme"), [completion_line("1", "mine")])
    make_tasks(api).look()
    close_clients()
    tenant = api.tenant_id("acme")
    job = acme.post("/v1/jobs", json={"prompt": "a", "adapter": "mine"}).json()
    lane = parse_id("rev", job["revision"])
    assert lane is not None
    worker = api.ledger.start_worker()
    claimed = [(c.job, c.attempt) for c in api.ledger.claim(worker, [(lane, 8)])]
    with api.ledger.working() as conn:
        crashes.record_crash(conn, worker, claimed)
    api.ledger.release(worker, claimed)
    api.owner(lambda conn: set_limits(conn, tenant, {"adapters": 5}))
    return Tables(api)


def _expand_all(api: Api) -> None:
    with api.ledger.working() as conn:
        waiting = list(conn.execute(text("SELECT id FROM sweeps WHERE expand_due_at IS NOT NULL")).scalars())
    for sweep in waiting:
        Expander(api.ledger.work, api.ringer, api.ledger.pool).expand(sweep)


@pytest.fixture(params=["another tenant", "no tenant"])
def as_stranger(request: pytest.FixtureRequest, tables: Tables) -> Callable[[], Any]:
    """Opens a transaction as the API's role, that is not acme's."""
    engine: Engine = tables.api.ledger.api
    if request.param == "no tenant":
        return lambda: transaction(engine)
    return lambda: tenant_transaction(engine, tables.globex)


def test_every_table_with_a_tenant_in_it_is_tried(tables: Tables) -> None:
    statement = text(
        "SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid WHERE a.attname = 'tenant_id'"
        " AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace"
    )
    with_tenant = set(tables.api.owner(lambda conn: list(conn.execute(statement).scalars())))
    assert with_tenant | {"tenants"} <= set(tables.names)
    assert [name for name in tables.names if not tables.rows(name)] == []


def test_nothing_of_a_tenants_is_seen_by_a_stranger(tables: Tables, as_stranger: Callable[[], Any]) -> None:
    for table in tables.names:
        with as_stranger() as conn:
            statement = text(f"SELECT count(*) FROM {table} WHERE {tables.owner_of(table)} = :acme")
            assert conn.execute(statement, {"acme": tables.acme}).scalar_one() == 0, table


def test_a_new_table_is_tried_without_a_word_about_it_here_and_a_policy_that_forgets_the_tenant_is_seen(
    tables: Tables,
) -> None:
    def make(conn: Connection) -> None:
        conn.execute(
            text(
                "CREATE TABLE extras (id uuid PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants (id),"
                " adapter_id uuid NOT NULL REFERENCES adapters (id), kind text NOT NULL CHECK (kind IN ('a', 'b')),"
                " digest bytea NOT NULL, sizes integer[] NOT NULL, at timestamptz NOT NULL)"
            )
        )
        conn.execute(text("ALTER TABLE extras ENABLE ROW LEVEL SECURITY"))
        conn.execute(text("CREATE POLICY forgetful ON extras TO medley_api USING (true)"))
        conn.execute(text("GRANT SELECT ON extras TO medley_api"))

    tables.api.owner(make)
    try:
        again = Tables(tables.api)
        assert set(again.names) - set(tables.names) == {"extras"}
        assert len(again.rows("extras")) == 1
        with tenant_transaction(tables.api.ledger.api, tables.globex) as conn:
            assert conn.execute(text("SELECT count(*) FROM extras")).scalar_one() == 1
    finally:
        tables.api.owner(lambda conn: conn.execute(text("DROP TABLE extras")))


def test_nothing_of_a_tenants_is_changed_or_deleted_by_a_stranger(
    tables: Tables, as_stranger: Callable[[], Any]
) -> None:
    before = tables.snapshot()
    for table in tables.names:
        with tables.api.ledger.api.connect() as conn:
            names = [column.column_name for column in tables.columns(conn, table)]
        statements = [f"UPDATE {table} SET {name} = {name}" for name in names] + [f"DELETE FROM {table}"]
        for statement in statements:
            whose = f"{statement} WHERE {tables.owner_of(table)} = :acme"
            assert _num_written(as_stranger, whose, tables.acme) == 0, whose
    assert tables.snapshot() == before


def _num_written(as_stranger: Callable[[], Any], statement: str, acme: UUID) -> int:
    """How many rows it changed; none where the role may not do this at all."""
    try:
        with as_stranger() as conn:
            num_rows: int = conn.execute(text(statement), {"acme": acme}).rowcount
    except ProgrammingError as error:
        if "permission denied" not in str(error):
            raise
        return 0
    return num_rows


def test_no_row_is_written_in_a_tenants_name_by_a_stranger(tables: Tables, as_stranger: Callable[[], Any]) -> None:
    before = tables.snapshot()
    for table, rows in before.items():
        with tables.api.ledger.api.connect() as conn:
            names = ", ".join(column.column_name for column in tables.columns(conn, table))
        statement = text(
            f"INSERT INTO {table} ({names})"
            f" SELECT {names} FROM jsonb_populate_record(null::{table}, CAST(:row AS jsonb))"
        )
        with pytest.raises(ProgrammingError, match=r"permission denied|row-level security"), as_stranger() as conn:
            conn.execute(statement, {"row": rows[0]})
    assert tables.snapshot() == before


def test_a_row_cannot_be_given_to_another_tenant(tables: Tables) -> None:
    for table in tables.names:
        column = tables.owner_of(table)
        with (
            pytest.raises(DBAPIError, match=r"permission denied|row-level security"),
            tenant_transaction(tables.api.ledger.api, tables.acme) as conn,
        ):
            conn.execute(text(f"UPDATE {table} SET {column} = :globex"), {"globex": tables.globex})


@pytest.mark.parametrize("bound", ["another tenant", "no tenant"])
def test_the_apis_own_statements_do_nothing_once_their_tenant_is_wrong(
    tables: Tables, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is acme, and so is every id and every `tenant_id` that the API writes; the transaction is not."""
    api = tables.api
    acme = api.as_tenant("acme")
    jobs = [row.id for row in api.ledger.jobs().values() if row.tenant_id == tables.acme]
    [key, *_] = acme.get("/v1/keys").json()["keys"]
    [webhook] = acme.get("/v1/webhooks").json()["webhooks"]
    [file, *_] = acme.get("/openai/v1/files").json()["data"]
    [batch, *_] = acme.get("/openai/v1/batches").json()["data"]
    paths = {
        "name": "mine",
        "owner": "acme",
        "tenant": "initech",
        "job_id": f"job_{jobs[0].hex}",
        "batch_id": batch["id"],
        "file_id": file["id"],
        "model": "mine",
        "sweep_id": "s",
        "key_id": key["id"],
        "webhook_id": webhook["id"],
    }
    before = tables.snapshot()

    @contextmanager
    def misbound(engine: Engine, _tenant: UUID, **_options: Any) -> Iterator[Connection]:
        with transaction(engine) if bound == "no tenant" else tenant_transaction(engine, tables.globex) as conn:
            yield conn

    def misread(engine: Engine, tenant: UUID, statement: str, parameters: Any) -> Sequence[Any]:
        with misbound(engine, tenant) as conn:
            return conn.exec_driver_sql(statement, parameters).all()

    monkeypatch.setattr(sql, "tenant_transaction", misbound)
    monkeypatch.setattr(results, "read_as_tenant", misread)
    for route in CLOSED:
        response = acme.request(route.method, route.path.format(**paths), **_body(route, file["id"]))
        if route.names_something and route.method != "PUT":
            assert response.status_code == 404, (route, response.text)
        elif route.method != "GET":
            assert response.status_code in (400, 403, 404, 500), (route, response.text)
        else:
            told = response.text
            assert not [
                known for name, known in paths.items() if name not in ("owner", "tenant") and f'"{known}"' in told
            ], (route, told)
    monkeypatch.undo()
    assert tables.snapshot() == before


def _body(route: Route, file: str) -> dict[str, Any]:
    """A body that would be taken."""
    bodies: dict[str, dict[str, Any]] = {
        "POST /v1/jobs": {"json": {"prompt": "a"}},
        "POST /v1/batches": {"json": {"jobs": [{"prompt": "a"}]}},
        "POST /v1/sweeps": {"json": {"name": "t", "prompts": ["a"], "include_base": True}},
        "POST /v1/keys": {"json": {"name": "a"}},
        "PATCH /v1/batches/{batch_id}": {"json": {"priority": "high"}},
        "POST /v1/sweeps/{sweep_id}/extend": {"json": {"seeds": [7]}},
        "POST /v1/webhooks": {"json": WEBHOOK},
        "PATCH /v1/webhooks/{webhook_id}": {"json": {"enabled": False}},
        "POST /v1/adapters/{name}/grants": {"json": {"tenant": "globex"}},
        "PUT /v1/adapters/{name}": {"files": adapter_files()},
        "POST /openai/v1/files": {"files": {"file": b"{}"}, "data": {"purpose": "batch"}},
        "POST /openai/v1/batches": {
            "json": {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        },
        "POST /openai/v1/completions": {"json": {"model": "model", "prompt": "a"}},
    }
    return bodies.get(str(route), {})
