"""A real API process, and the judge of what hostile requests do to it: a clear 4xx, bounded memory, nothing written."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
from api_server import MODEL, adapter_files
from sqlalchemy import create_engine, text
from waiting import wait_until

from medley.db.connections import make_engine, transaction
from medley.db.models import metadata
from medley.db.tenants import add_tenant
from medley.store import Store

MIB = 1 << 20
MAX_BODY_BYTES = 8 * MIB
# What requests of the corpus may add to the process, all of them together: bodies are 8 MiB at the most.
MAX_GROWTH_BYTES = 320 * MIB
# Rows that requests which do nothing may still write: none.
TABLES = [table.name for table in metadata.sorted_tables if table.name not in ("workers", "leaders")]


class Target:
    """The process. `refused` is how every request of the corpus must end."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, database: Any, store: Store, key: str) -> None:
        self.process, self.url, self.store, self.key = process, url, store, key
        self._engine = make_engine(database.url("medley_work"), name="test", pool_size=1)
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def close(self) -> None:
        self.client.close()
        self._engine.dispose()

    def snapshot(self) -> tuple[dict[str, int], frozenset[str]]:
        """How many rows each table has, and every object of the store."""
        with transaction(self._engine) as conn:
            rows = {table: conn.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in TABLES}
            # The same files again are taken again, which is noted each time.
            uploads = text("SELECT count(*) FROM audit_log WHERE action = 'adapter.upload'")
            rows["audit_log"] -= conn.execute(uploads).scalar_one()
        return rows, frozenset(self.store.objects.keys(""))

    def peak_bytes(self) -> int:
        """The most memory that the process has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def refused(self, response: httpx.Response, *fields: str) -> None:
        """A clear refusal: 4xx in the one shape, with a fault that names each of `fields` at the least."""
        assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
        error = response.json()["error"]
        assert all(error[name] for name in ("code", "message")), response.text[:500]
        found = " ".join(f"{fault['field']} {fault['got']}" for fault in error.get("faults", []))
        if response.status_code == 400:
            assert error["faults"], response.text[:500]
        for field in fields:
            assert field in found, (field, found[:1000])
        assert len(response.content) < 512 << 10, "a refusal is not an echo"

    def serves(self) -> bool:
        return self.process.poll() is None and self.client.get("/v1/tenant").status_code == 200

    def raw(self, parts: Iterable[bytes], *, then_close: bool = False) -> bytes:
        """What comes back for bytes as they are, until the other side closes."""
        host, port = self.url.removeprefix("http://").split(":")
        received = b""
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in parts:
                    connection.sendall(part)
                if then_close:
                    connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(1 << 16):
                    received += chunk
        return received


@contextlib.contextmanager
def running_target(database: Any, redis_url: str, folder: Path) -> Iterator[Target]:
    """Serves until the block ends."""
    owner = create_engine(database.url("medley_owner"))
    with owner.begin() as conn:
        key = add_tenant(conn, "mallory")
    owner.dispose()
    store_url = (folder / "store").as_uri()
    environ = os.environ | {
        "MEDLEY_DATABASE_URL": database.url("medley_api"),
        "MEDLEY_REDIS_URL": redis_url,
        "MEDLEY_STORE_URL": store_url,
        "MEDLEY_MODEL": str(MODEL),
        "MEDLEY_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "MEDLEY_MAX_PROMPT_BYTES": "4096",
    }
    with socket.create_server(("127.0.0.1", 0)) as listener, (folder / "api.log").open("wb") as log:
        command = [sys.executable, "-m", "medley", "api"]
        environ["MEDLEY_LISTEN_FD"] = str(listener.fileno())
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, pass_fds=[listener.fileno()])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    target = Target(process, url, database, Store.open(store_url), key)
    try:
        # The first of each request brings in what the process keeps; memory is judged after them.
        wait_until(lambda: process.poll() is not None or _is_up(target), "an API that serves")
        assert target.client.put("/v1/adapters/sound", files=adapter_files()).status_code == 201
        assert target.client.post("/v1/jobs", json={"prompt": "x", "adapter": "sound"}).status_code == 201
        yield target
    finally:
        target.close()
        process.terminate()
        assert process.wait(timeout=20) in (0, -signal.SIGTERM), (folder / "api.log").read_text()[-2000:]
    assert "Traceback" not in (folder / "api.log").read_text()


def _is_up(target: Target) -> bool:
    try:
        return target.client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False
