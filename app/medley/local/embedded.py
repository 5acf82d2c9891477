"""Embedded PostgreSQL and Redis together, as foreground children of this process.

They die with it, however it ends. It knows neither schema nor the processes of Medley. The supervisor takes
the two commands from here and runs them itself; tests and scripts use the class as a context manager.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from medley.local.binaries import find_binaries, server_account
from medley.local.child import Child, Command, describe_status
from medley.local.datadir import DataDir
from medley.local.postgres_server import PostgresServer
from medley.local.redis_server import RedisServer

_START_S = 30.0
_STOP_S = 10.0


class EmbeddedServers:
    """Both servers of one data directory.

    `with EmbeddedServers(DataDir.acquire(path)) as servers:` starts them and stops them; within,
    `servers.database_url(role)` and `servers.redis_url` tell where they are.
    """

    def __init__(self, data: DataDir, *, durable: bool = True, owner_may_create_databases: bool = False) -> None:
        self.data = data
        account = server_account(data)
        binaries = find_binaries(data, account)
        data.sockets.mkdir(mode=0o700, exist_ok=True)
        if account is not None:
            os.chown(data.sockets, account.uid, account.gid)
        self.postgres = PostgresServer(
            data,
            binaries,
            account,
            durable=durable,
            owner_may_create_databases=owner_may_create_databases,
        )
        self.redis = RedisServer(data, binaries, account)
        self._children: dict[str, Child] = {}

    def database_url(self, role: str, database: str = "medley") -> str:
        """A SQLAlchemy URL for one of the roles medley_owner, medley_api, medley_work."""
        return self.postgres.url(role, database)

    @property
    def redis_url(self) -> str:
        return self.redis.url

    @property
    def log_path(self) -> Path:
        """What the servers say when they are started from here."""
        return self.data.path / "servers.log"

    def start_postgres(self) -> None:
        """Start it and return once it accepts connections. Raises `RuntimeError` with the end of its log."""
        self.postgres.prepare()
        self._start(self.postgres.command(), self.postgres.is_ready)

    def start_redis(self) -> None:
        """Start it and return once it answers. Raises `RuntimeError` with the end of its log."""
        self._start(self.redis.command(), self.redis.is_ready)

    def pid(self, name: str) -> int:
        """The process id of "postgres" or "redis"."""
        return self._children[name].pid

    def stop(self, name: str) -> None:
        """Stop "postgres" or "redis" in good order; a stopped one is left alone."""
        child = self._children.pop(name, None)
        if child is not None:
            child.stop(_STOP_S)

    def kill(self, name: str) -> None:
        """SIGKILL "postgres" or "redis" and wait for its end."""
        child = self._children.pop(name)
        child.kill()
        child.wait(_STOP_S)

    def close(self) -> None:
        """Stop both, remove the sockets and let go of the data directory."""
        for name in ("redis", "postgres"):
            self.stop(name)
        self.data.release()

    def __enter__(self) -> Self:
        try:
            self.start_postgres()
            self.start_redis()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, command: Command, is_ready: Callable[[], bool]) -> None:
        with self.log_path.open("ab") as log:
            child = Child(command, output=log.fileno())
        self._children[command.name] = child
        deadline = time.monotonic() + _START_S
        while not is_ready():
            status = child.exit_status()
            if status is not None or time.monotonic() > deadline:
                ended = "does not answer" if status is None else f"ended with {describe_status(status)}"
                raise RuntimeError(f"{command.name} {ended}: {self.log_path.read_text()[-2000:]}")
            time.sleep(0.02)
