"""A fleet as a scenario sees it: a stack without workers of its own, and workers and dispatchers beside it.

Each is a process as a host of its own would run it: with its own way to PostgreSQL and Redis, its own clock, started
again when it ends. What happens to it is the scenario's business.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from clocks import skewed_environ
from cuts import Cut, Way
from stacks import ASSETS, LEASE_S, TICK_S, Service

from medley.local.child import Child, Command

SETTINGS = {"MEDLEY_LEASE_S": str(LEASE_S), "MEDLEY_TICK_S": str(TICK_S), "OMP_NUM_THREADS": "1"}


@dataclass
class Member:
    """One process of the fleet, and its ways to the servers."""

    name: str
    command: Command
    child: Child
    postgres: Cut
    redis: Cut
    log_path: Path
    is_kept: bool = True

    @property
    def pid(self) -> int:
        return self.child.pid

    def engine_pid(self) -> int | None:
        """Of a worker: the process that computes; None while there is none."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    what = (entry / "cmdline").read_text()
                except OSError:
                    continue
                if parent == self.pid and "medley_worker.engine.process" in what:
                    return int(entry.name)
        return None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def set_network(self, way: Way) -> None:
        self.postgres.set(way)
        self.redis.set(way)

    def log(self) -> str:
        return self.log_path.read_text()


@dataclass
class Fleet:
    service: Service
    folder: Path  # of sockets: short, as their names must be
    members: dict[str, Member] = field(default_factory=dict)

    def add(self, kind: str, name: str, *, skew_s: float = 0.0, **environ: str) -> Member:
        """Starts a "worker" or a "dispatcher" of that name."""
        stack, home = self.service.stack, self.folder / name
        home.mkdir()
        sockets = Path(parse_qs(urlsplit(stack.database_url("medley_work")).query)["host"][0])
        postgres = Cut(home / ".s.PGSQL.5432", sockets / ".s.PGSQL.5432")
        redis = Cut(home / "redis.sock", Path(stack.redis_url.removeprefix("unix://")))
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MEDLEY_")},
            **SETTINGS,
            "MEDLEY_DATABASE_URL": f"postgresql+psycopg://medley_work@/medley?host={home}",
            "MEDLEY_REDIS_URL": f"unix://{home}/redis.sock",
            "MEDLEY_STORE_URL": stack.store_url,
            "MEDLEY_MODEL": str(ASSETS / "model"),
            **(skewed_environ(home / "clock", skew_s) if skew_s else {}),
            **environ,
        }
        command = Command(name=name, argv=(sys.executable, "-m", "medley", kind), env=env)
        log_path = stack.data_dir / f"{name}.log"
        member = Member(name, command, _start(command, log_path), postgres, redis, log_path)
        self.members[name] = member
        return member

    def keep(self) -> None:
        """Starts again whoever has ended, as any supervisor would."""
        for member in self.members.values():
            if member.is_kept and member.child.exit_status() is not None:
                member.child = _start(member.command, member.log_path)

    def workers(self) -> list[Member]:
        return [member for name, member in self.members.items() if name.startswith("worker")]

    def count_awake(self) -> int:
        """Workers that are active or told to be."""
        return self.service.scalar("SELECT count(*) FROM workers WHERE state <> 'gone' AND desired_state = 'active'")

    def close(self) -> None:
        for member in self.members.values():
            member.is_kept = False
            if member.child.exit_status() is None:
                os.kill(member.pid, signal.SIGCONT)
                member.child.kill()
                member.child.wait(10)
            member.postgres.close()
            member.redis.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def make_fleet(service: Service) -> Fleet:
    """Whoever ends is started again while the scenario waits: children die with the thread that starts them."""
    fleet = Fleet(service, Path(tempfile.mkdtemp(prefix="mf-")))
    service.while_waiting = fleet.keep
    return fleet


def _start(command: Command, log_path: Path) -> Child:
    with log_path.open("ab") as log:
        return Child(command, output=log.fileno())
