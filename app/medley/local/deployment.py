"""A whole Medley on one machine, in the foreground: what `medley up` runs.

It joins the embedded servers, the table of processes and the supervisor: servers first, then the migrations,
then everything else. It knows no process's insides; what it tells them goes through their environment.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medley.config import device_from_env, inherited_env, scale_secret_env
from medley.health import is_alive
from medley.local.child import Command
from medley.local.datadir import DataDir
from medley.local.embedded import EmbeddedServers
from medley.local.gpus import share_gpus, visible_gpus
from medley.local.lines import LineLog
from medley.local.processes import PROCESSES, Health, ProcessSpec, process
from medley.local.status import StackStatus, write_status
from medley.local.supervisor import ChildFailed, Supervisor, Unit

_SERVER_START_S = 60.0
_SERVER_GRACE_S = 15.0
# Once all is ready a crash is only ever answered by a new start; before, this many mean that it cannot work.
_MAX_START_CRASHES = 5
# Servers stop after everything that uses them, PostgreSQL last.
_REDIS_STAGE, _POSTGRES_STAGE = 10, 11
_BACKLOG = 512


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What `medley up` was asked for. `environ` adds to, and overrides, what the processes inherit."""

    data_dir: Path
    model: str
    workers: int = 1
    host: str = "127.0.0.1"
    port: int = 8700  # 0: any free one
    environ: Mapping[str, str] = field(default_factory=dict)


def run(options: UpOptions, log: LineLog) -> None:
    """Start everything, say when it is ready, and return once a signal has stopped it.

    Raises `DataDirInUse`, `EmbeddedServersUnavailable`, `ChildFailed`, `TooFewGpus`, `ConfigError` for what it is told
    of the workers' devices, or `OSError` where the port is taken.
    """
    places = _worker_places(options)
    data = DataDir.acquire(options.data_dir)
    try:
        with _listen(options.host, options.port) as listener:
            _Deployment(options, data, listener, log, places).run()
    finally:
        data.release()


def _listen(host: str, port: int) -> socket.socket:
    """The API's socket. It is held here, so that clients wait, rather than fail, while the API starts again."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _worker_places(options: UpOptions) -> list[dict[str, str]]:
    """What each worker's environment says of where it computes: its share of the cores, and GPUs of its own."""
    env = inherited_env() | dict(options.environ)
    device, size, share = device_from_env(env)
    # Each process would otherwise start a thread on every core.
    threads = max(1, (os.cpu_count() or 1) // max(1, options.workers * size))
    cores = {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(threads))}
    if not device.startswith("cuda") or not options.workers:
        return [cores] * options.workers
    return [cores | gpus for gpus in share_gpus(visible_gpus(env), device, options.workers, size, share)]


class _Deployment:
    """places: what each worker's environment says of devices and threads."""

    def __init__(
        self,
        options: UpOptions,
        data: DataDir,
        listener: socket.socket,
        log: LineLog,
        places: Sequence[Mapping[str, str]],
    ) -> None:
        self._options = options
        self._places = places
        self._data = data
        self._listener = listener
        self._log = log
        self._servers = EmbeddedServers(data)
        self._is_ready = False
        self._gpus = visible_gpus({**inherited_env(), **options.environ})
        host = f"[{options.host}]" if ":" in options.host else options.host
        self._url = f"http://{host}:{listener.getsockname()[1]}"

    def run(self) -> None:
        with Supervisor(self._log, on_change=self._write_status) as supervisor:
            self._start_servers(supervisor)
            supervisor.run_once(self._unit(process("migrate"), "migrate"))
            for name, spec in self._kept():
                supervisor.keep(self._unit(spec, name))
            self._await_ready(supervisor)
            self._is_ready = True
            self._write_status(supervisor.pids())
            key = f"medley tenants add NAME --data-dir {self._options.data_dir}"
            self._log.write(
                "up", f"ready: {self._url} model={self._options.model} workers={self._options.workers}; a key: {key}"
            )
            supervisor.watch()
            self._is_ready = False
            self._write_status(supervisor.pids())

    def _start_servers(self, supervisor: Supervisor) -> None:
        postgres, redis = self._servers.postgres, self._servers.redis

        def start_postgres() -> Command:
            postgres.prepare()
            return postgres.command()

        for unit, is_ready in (
            (Unit("postgres", start_postgres, _POSTGRES_STAGE, _SERVER_GRACE_S), postgres.is_ready),
            (Unit("redis", redis.command, _REDIS_STAGE, _SERVER_GRACE_S), redis.is_ready),
        ):
            supervisor.keep(unit)
            if not supervisor.wait_for(is_ready, _SERVER_START_S):
                raise ChildFailed(f"{unit.name} does not answer; its last lines say why")

    def _kept(self) -> list[tuple[str, ProcessSpec]]:
        """The processes to keep running, by name: `api`, ..., `worker.0`, `worker.1`."""
        named = []
        for spec in PROCESSES:
            if spec.is_replicated:
                named += [(f"{spec.name}.{i}", spec) for i in range(self._options.workers)]
            elif spec.health is not Health.EXIT:
                named.append((spec.name, spec))
        return named

    def _unit(self, spec: ProcessSpec, name: str) -> Unit:
        command = Command(
            name=name,
            argv=(sys.executable, "-m", "medley", spec.name),
            env=self._environ(spec, name),
            pass_fds=(self._listener.fileno(),) if spec.serves_port else (),
        )
        return Unit(name, lambda: command, spec.stop_stage, spec.stop_grace_s)

    def _environ(self, spec: ProcessSpec, name: str) -> dict[str, str]:
        env = inherited_env()
        if spec.image != "worker":
            env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("MEDLEY_WEBHOOK_LOOPBACK", "true")  # whoever runs this is its only tenant
        env |= self._options.environ
        if spec.is_replicated:
            env |= self._places[int(name.rpartition(".")[2])]
        env |= {
            "MEDLEY_DATABASE_URL": self._servers.database_url(spec.role),
            "MEDLEY_REDIS_URL": self._servers.redis_url,
            "MEDLEY_STORE_URL": self._data.store.as_uri(),
            "MEDLEY_MODEL": self._options.model,
            "MEDLEY_LOG_FORMAT": "bare",
            "PYTHONUNBUFFERED": "1",
        }
        if spec.health is Health.BEAT:
            env["MEDLEY_HEALTH_FILE"] = str(self._health_file(name))
        if spec.name == "dispatcher":
            env |= scale_secret_env()
        else:
            env.pop("MEDLEY_SCALE_HOOK", None)  # which wants the secret
        if spec.serves_port:
            env["MEDLEY_LISTEN_FD"] = str(self._listener.fileno())
        return env

    def _health_file(self, name: str) -> Path:
        return self._data.runtime / f"{name}.beat"

    def _await_ready(self, supervisor: Supervisor) -> None:
        """Until the API says so and every other process has made a turn of its loop."""
        beating = [self._health_file(name) for name, spec in self._kept() if spec.health is Health.BEAT]
        api_ready = threading.Event()
        threading.Thread(target=self._poll_api, args=(api_ready,), daemon=True).start()

        def is_ready() -> bool:
            failing = [name for name, times in supervisor.crashes().items() if times >= _MAX_START_CRASHES]
            if failing:
                raise ChildFailed(f"{', '.join(failing)} did not start; the last lines above say why")
            return api_ready.is_set() and all(is_alive(path) for path in beating)

        supervisor.wait_for(is_ready)

    def _poll_api(self, ready: threading.Event) -> None:
        """Ask until the answer is yes. On a thread: the socket accepts before there is an API behind it."""
        host, port = self._listener.getsockname()[:2]
        pause = threading.Event()
        while not ready.is_set():
            connection = http.client.HTTPConnection(host, port, timeout=2)
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    ready.set()
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            pause.wait(0.05)

    def _write_status(self, pids: dict[str, int]) -> None:
        write_status(
            self._data.path,
            StackStatus(
                pid=os.getpid(),
                url=self._url,
                database_urls={
                    role: self._servers.database_url(role) for role in sorted({spec.role for spec in PROCESSES})
                },
                redis_url=self._servers.redis_url,
                store_url=self._data.store.as_uri(),
                pids=pids,
                is_ready=self._is_ready,
            ),
        )
