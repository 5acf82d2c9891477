"""A real API process's inside, in a thread of the test: uvicorn on a loopback socket, PostgreSQL, Redis, a store.

`Api` is the service with a `Ledger` on the same pool, whose fake workers claim and complete what is submitted.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest
import structlog
from ledger import Ledger
from sqlalchemy import create_engine, text

from medley.api.server import make_server
from medley.config import Limits, Settings
from medley.db.ends import Ended
from medley.db.tenants import add_tenant
from medley.rings import Ringer

ASSETS = Path(__file__).parents[2] / "app/medley/demo/assets"
MODEL = ASSETS / "model"
ADAPTERS = ASSETS / "adapters"
UNLIMITED = httpx.Limits(max_connections=None)
_numbers = itertools.count(1)

# structlog's own tracebacks, with every local variable, take a second each.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


class Api:
    """The running service. `as_tenant(name)` is a client with a key of that tenant; `anonymous` has none."""

    def __init__(self, url: str, ledger: Ledger, settings: Settings, owner_url: str, app: Any) -> None:
        self.url, self.ledger, self.settings = url, ledger, settings
        self._app = app
        self.owner_url = owner_url
        self._clients: dict[str | None, httpx.Client] = {}
        self.ringer = Ringer(settings.redis_url)
        self._tenant = "acme"

    def take_new_tenant(self) -> str:
        """From now on the default tenant is a new one: a worker that claims for it finds its jobs alone."""
        self._tenant = f"acme{next(_numbers)}"
        return self._tenant

    @property
    def anonymous(self) -> httpx.Client:
        return self._client(None)

    def as_tenant(self, name: str | None = None) -> httpx.Client:
        return self._client(name or self._tenant)

    def headers(self) -> dict[str, str]:
        """What the default tenant's requests carry."""
        return dict(self.as_tenant().headers)

    def num_waiting(self) -> int:
        """How many requests the waiter hub holds."""
        num: int = self._app.state.services.hub.num_waiting
        return num

    def key(self, tenant: str) -> str:
        """A new key of the tenant, who is made where new."""
        key: str = self.owner(lambda conn: add_tenant(conn, tenant))
        self.ledger.weights[self.tenant_id(tenant)] = 1.0
        return key

    def owner(self, act: Any) -> Any:
        engine = create_engine(self.owner_url)
        try:
            with engine.begin() as conn:
                # Tests commit without waiting for the disk; what the owner makes must outlive a killed server.
                conn.execute(text("SET LOCAL synchronous_commit = on"))
                return act(conn)
        finally:
            engine.dispose()

    def tenant_id(self, name: str) -> UUID:
        statement = text("SELECT id FROM tenants WHERE name = :name")
        found: UUID = self.owner(lambda conn: conn.execute(statement, {"name": name}).scalar_one())
        return found

    def upload(self, name: str, *, tenant: str | None = None, folder: str = "add") -> httpx.Response:
        """Uploads one of the demo's adapters."""
        return self.as_tenant(tenant).put(f"/v1/adapters/{name}", files=adapter_files(folder))

    def finish(self, batch: str, num_jobs: int = 1_000_000, *, rings: bool = True, **fields: Any) -> list[Ended]:
        """A fake worker claims and completes up to `num_jobs` of the batch's queued jobs."""
        worker = self.ledger.start_worker()
        with self.ledger.working() as conn:
            rows = conn.execute(
                text("SELECT lane, count(*) FROM jobs WHERE batch_id = :id AND state = 'queued' GROUP BY lane"),
                {"id": UUID(batch.partition("_")[2])},
            ).all()
        ended: list[Ended] = []
        for lane, count in rows:
            claimed = self.ledger.claim(worker, [(lane, min(count, num_jobs - len(ended)))])
            ended += self.ledger.complete(worker, [(c.job, c.attempt) for c in claimed], **fields)
        if rings:
            for end in ended:
                self.ringer.ring_done(end.batch)
        return ended

    def _client(self, tenant: str | None) -> httpx.Client:
        if tenant not in self._clients:
            headers = {} if tenant is None else {"Authorization": f"Bearer {self.key(tenant)}"}
            self._clients[tenant] = httpx.Client(base_url=self.url, headers=headers, timeout=60, limits=UNLIMITED)
        return self._clients[tenant]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self.ringer.close()


@contextmanager
def running_api(
    database: Any,
    redis_url: str,
    store_url: str,
    *,
    limits: Limits | None = None,
    model: str | None = str(MODEL),
    **settings_fields: Any,
) -> Iterator[Api]:
    """Serves until the block ends."""
    ledger = Ledger(database)
    settings = Settings(
        database_url=database.url("medley_api"),
        redis_url=redis_url,
        store_url=store_url,
        model=model,
        pool=ledger.pool,
        limits=limits or Limits(),
        **settings_fields,
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    server = make_server(settings)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    api = Api(
        f"http://127.0.0.1:{listener.getsockname()[1]}",
        ledger,
        settings,
        database.url("medley_owner"),
        server.config.app,
    )
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield api
    finally:
        api.close()
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        ledger.close()
        assert not thread.is_alive()


def adapter_files(folder: str = "add", **replaced: bytes) -> dict[str, tuple[str, bytes, str]]:
    """The two parts of an upload: `config` and `weights` replace what is in the folder."""
    config = replaced.get("config", (ADAPTERS / folder / "adapter_config.json").read_bytes())
    weights = replaced.get("weights", (ADAPTERS / folder / "adapter_model.safetensors").read_bytes())
    return {
        "adapter_config.json": ("adapter_config.json", config, "application/json"),
        "adapter_model.safetensors": ("adapter_model.safetensors", weights, "application/octet-stream"),
    }


def stop_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows in which a process counts requests by itself go by no more: no test falls into two of them."""
    now = time.time()
    monkeypatch.setattr("limits.aio.storage.memory.time", SimpleNamespace(time=lambda: now))


def uuid_of(public: str) -> UUID:
    """Of an id as the API shows it: job_..., batch_..., rev_..."""
    return UUID(public.rpartition("_")[2])


def fields_of(response: httpx.Response) -> list[str]:
    """The fields that a refusal names."""
    return [fault["field"] for fault in response.json()["error"]["faults"]]
