"""The whole API over TLS to PostgreSQL and Redis: certificates are verified, and names too.

The embedded servers speak no TLS, so each stands behind a proxy that does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from api_server import running_api
from waiting import wait_until

from medley.celery_app import TASKS_QUEUE, make_celery
from medley.config import Settings, database_url_from_env
from medley.local.embedded import EmbeddedServers
from medley.rings import EXPAND_TASK, Bell, Ringer

SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
PASSWORD = "kEwp3vT0"


class TlsProxy:
    """TLS on a loopback port before a Unix socket. `begins_plain`: as PostgreSQL does, which is asked for TLS first."""

    def __init__(self, target: str, context: ssl.SSLContext, *, begins_plain: bool) -> None:
        self._target, self._context, self._begins_plain = target, context, begins_plain
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_encrypted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as server:
            if self._begins_plain:
                if client.recv(8, socket.MSG_WAITALL) != SSL_REQUEST:
                    return
                client.sendall(b"S")
            with self._context.wrap_socket(client, server_side=True) as encrypted:
                self.num_encrypted += 1
                server.connect(self._target)
                _pump(encrypted, server)


def _pump(encrypted: ssl.SSLSocket, server: socket.socket) -> None:
    while True:
        ready = [encrypted] if encrypted.pending() else select.select([encrypted, server], [], [])[0]
        for source in ready:
            data = source.recv(1 << 16)
            if not data:
                return
            (server if source is encrypted else encrypted).sendall(data)


@dataclass
class Encrypted:
    """Both servers behind TLS on localhost, and how processes are told to reach them."""

    postgres: TlsProxy
    redis: TlsProxy
    authority: Path
    database: Any

    def environ(self, role: str, *, host: str = "localhost", authority: Path | None = None) -> dict[str, str]:
        ca = str(authority or self.authority)
        return {
            "MEDLEY_DATABASE_URL": f"postgresql+psycopg://{role}@{host}:{self.postgres.port}/{self.database.name}",
            "MEDLEY_DATABASE_PASSWORD": PASSWORD,
            "MEDLEY_DATABASE_SSLMODE": "verify-full",
            "MEDLEY_DATABASE_SSLROOTCERT": ca,
            "MEDLEY_REDIS_URL": f"rediss://encrypted@{host}:{self.redis.port}/0",
            "MEDLEY_REDIS_PASSWORD": PASSWORD,
            "MEDLEY_REDIS_CA": ca,
            "MEDLEY_STORE_URL": "file:///tmp",
        }

    def url(self, role: str) -> str:
        """As a `Database` has it."""
        url = database_url_from_env(self.environ(role))
        assert url is not None
        return url


@pytest.fixture
def encrypted(database: Any, embedded: EmbeddedServers, tmp_path: Path) -> Iterator[Encrypted]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    # PostgreSQL's own socket takes any password; Redis gets an account of this one.
    with redis.Redis.from_url(embedded.redis_url) as client:
        client.acl_setuser(
            "encrypted", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], categories=["+@all"]
        )
    sockets = embedded.data.sockets
    made = Encrypted(
        TlsProxy(f"{sockets}/.s.PGSQL.5432", context, begins_plain=True),
        TlsProxy(f"{sockets}/redis.sock", context, begins_plain=False),
        tmp_path / "ca.pem",
        database,
    )
    yield made
    made.postgres.close()
    made.redis.close()
    with redis.Redis.from_url(embedded.redis_url) as client:
        client.acl_deluser("encrypted")


@pytest.mark.usefixtures("patient")
def test_everything_that_connects_does_so_over_tls(encrypted: Encrypted, store_url: str, redis_url: str) -> None:
    settings = Settings.from_env(encrypted.environ("medley_api"))
    bell = Bell(settings.redis_url, "medley:ring:x")
    wait_until(lambda: bell.wait_for_ring(1), "a new subscription, which counts as a ring")
    ringer = Ringer(settings.redis_url)
    ringer.ring("medley:ring:x")
    assert bell.wait_for_ring(60)
    ringer.send_task(EXPAND_TASK, "0" * 32)
    with redis.Redis.from_url(redis_url) as client:
        wait_until(lambda: client.llen(TASKS_QUEUE) == 1, "a Celery message that came over TLS")
    broker = make_celery(settings.redis_url, consumes=True).connection_for_read()
    with broker, broker.SimpleQueue(TASKS_QUEUE) as waiting:
        waiting.get(timeout=10).ack()
    ringer.close()
    bell.close()
    before = encrypted.redis.num_encrypted
    with running_api(encrypted, settings.redis_url, store_url) as api:
        expected = {"postgres": True, "migrations": True, "redis": True, "model": True}
        wait_until(lambda: api.anonymous.get("/readyz").json() == expected)
        job = api.as_tenant().post("/v1/jobs", json={"prompt": "a"}).json()
        api.finish(job["batch_id"])
        assert api.as_tenant().get(f"/v1/jobs/{job['id']}?wait=10").json()["state"] == "succeeded"
    assert encrypted.postgres.num_encrypted > 3
    assert encrypted.redis.num_encrypted >= before + 3, "rates, the waiters' ear and the ringer"


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    encrypted: Encrypted, store_url: str, tmp_path: Path, wrong: str
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    environ = (
        encrypted.environ("medley_api", authority=other)
        if wrong == "authority"
        else encrypted.environ("medley_api", host="127.0.0.1")
    )
    settings = Settings.from_env(environ)
    database = _Misled(encrypted, settings.database_url)
    with running_api(database, settings.redis_url, store_url) as api:
        ready = api.anonymous.get("/readyz")
    assert ready.status_code == 503
    assert (ready.json()["postgres"], ready.json()["redis"]) == (False, False)


@dataclass
class _Misled:
    """The database as the API's role alone is misled about it."""

    encrypted: Encrypted
    api_url: str

    def url(self, role: str) -> str:
        return self.api_url if role == "medley_api" else self.encrypted.url(role)
