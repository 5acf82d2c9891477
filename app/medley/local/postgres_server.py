"""The embedded PostgreSQL: its data directory, its command line, whether it answers.

It knows no schema: the migrations make that. The superuser exists for initdb and for `owner.sql`, run in
single-user mode (compose.yaml runs the same file); pg_hba.conf then refuses it, so nothing ever connects as
superuser.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path

import psycopg

from medley.local.binaries import Binaries
from medley.local.child import Account, Command
from medley.local.datadir import DataDir

# Names the current folder, so that the server works below folders its account may not walk through: it is
# started inside its data directory and never leaves it.
_HERE = "/proc/self/cwd"
_HBA = "# Written by Medley. The socket's folder is closed to all but the server's account and root.\n"
# A statement that fails is logged without its text, its parameters and the row that it failed on: they hold prompts.
DISCREET = {
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_parameter_max_length_on_error": "0",
    "log_statement": "none",
}
# The jobs of a lane lie scattered over their tables; where these do not fit, each claim reads most pages anew
# (measured over 760,000 jobs: a tenth fewer jobs/s with PostgreSQL's own 128 MB). Taken as they are used.
SHARED_BUFFERS_MB = 1024
_LOCAL_ROLES = ("medley_owner", "medley_api", "medley_work")
# How long a postmaster of a killed supervisor may take to end.
_PREVIOUS_GRACE_S = 15.0


class PostgresServer:
    """PostgreSQL 18 on a Unix socket. `durable=False` turns fsync off, for tests that kill processes only."""

    def __init__(
        self,
        data: DataDir,
        binaries: Binaries,
        account: Account | None,
        *,
        durable: bool = True,
        owner_may_create_databases: bool = False,
    ) -> None:
        self._data = data
        self._binaries = binaries
        self._account = account
        self._durable = durable
        self._owner_may_create_databases = owner_may_create_databases

    @property
    def pgdata(self) -> Path:
        return self._data.postgres

    def url(self, role: str, database: str = "medley") -> str:
        """A SQLAlchemy URL for `role`; the socket is private, so there is no password."""
        return f"postgresql+psycopg://{role}@/{database}?host={self._data.sockets}"

    def prepare(self) -> None:
        """Make the data directory where there is none, and wait for a killed supervisor's server to end.

        Raises `RuntimeError` with PostgreSQL's own words where initdb fails.
        """
        if not self.pgdata.exists():
            self._initialise()
        self._await_previous()

    def command(self) -> Command:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._data.sockets),
            "unix_socket_permissions": "0700",
            "max_connections": "200",
            "shared_buffers": f"{_shared_buffers_mb()}MB",
            "wal_level": "minimal",  # no replicas of an embedded server
            "max_wal_senders": "0",
            "fsync": "on" if self._durable else "off",
            "jit": "off",  # statements are short
            "log_line_prefix": "",
            "log_checkpoints": "off",
            **DISCREET,
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        flags = [flag for key, value in settings.items() for flag in ("-c", f"{key}={value}")]
        return Command(
            name="postgres",
            argv=(str(self._binaries.postgres), "-D", _HERE, *flags),
            env=_server_env(),
            cwd=self.pgdata,
            account=self._account,
            # Fast shutdown: end all sessions, checkpoint, exit.
            stop_signal=signal.SIGINT,
            # Immediate shutdown: all its processes end at once; the log is replayed at the next start.
            death_signal=signal.SIGQUIT,
        )

    def is_ready(self) -> bool:
        """True where it accepts connections. While it starts it is not asked, as it would log each refusal."""
        if not self._says_ready():
            return False
        try:
            psycopg.connect(
                host=str(self._data.sockets), user="medley_owner", dbname="medley", connect_timeout=2
            ).close()
        except psycopg.OperationalError:
            return False
        return True

    def _says_ready(self) -> bool:
        """The eighth line of postmaster.pid is the server's state."""
        try:
            lines = (self.pgdata / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _initialise(self) -> None:
        """initdb beside the final place, then rename: a half-made one is never taken for a whole one."""
        fresh = self.pgdata.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if self._account is not None:
            os.chown(fresh, self._account.uid, self._account.gid)
        sync = [] if self._durable else ["--no-sync"]
        encoding = ["--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8"]
        initdb = [
            str(self._binaries.initdb),
            "-D",
            _HERE,
            "-U",
            "postgres",
            "--auth=reject",
            "--no-instructions",
        ]
        self._run_once([*initdb, *encoding, *sync], fresh)
        statements = resources.files("medley.local").joinpath("owner.sql").read_text()
        if self._owner_may_create_databases:
            # Dropping a database ends the sessions in it, whoever's they are.
            statements += "ALTER ROLE medley_owner CREATEDB;\nGRANT pg_signal_backend TO medley_owner;\n"
        self._run_once([str(self._binaries.postgres), "--single", "-D", _HERE, "postgres"], fresh, statements)
        rules = [f"local all {role} trust\n" for role in _LOCAL_ROLES]
        (fresh / "pg_hba.conf").write_text(_HBA + "".join(rules) + "local all all reject\n")
        fresh.rename(self.pgdata)

    def _run_once(self, argv: list[str], cwd: Path, text: str = "") -> None:
        command = Command(name="initdb", argv=tuple(argv), env=_server_env(), cwd=cwd, account=self._account)
        done = subprocess.run(
            command.wrapped(),
            cwd=cwd,
            env=command.env,
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        # The single-user server reports a failed statement and exits with 0.
        if done.returncode != 0 or "ERROR:" in done.stderr or "FATAL:" in done.stderr:
            raise RuntimeError(f"{Path(argv[0]).name} failed in {cwd}: {done.stderr.strip()[-2000:]}")

    def _await_previous(self) -> None:
        """Remove postmaster.pid once no process of an earlier server is left.

        We hold the data directory's lock, so such a server has lost its supervisor or its postmaster and is
        ending. The process id in that file says nothing, as ids come back after a restart of a container, and
        sessions may outlive their postmaster by a moment: what counts is who stands in the folder.
        """
        deadline = time.monotonic() + _PREVIOUS_GRACE_S
        while (pid := self._process_here()) is not None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"process {pid} of another PostgreSQL still runs on {self.pgdata}: stop it")
            time.sleep(0.05)
        (self.pgdata / "postmaster.pid").unlink(missing_ok=True)

    def _process_here(self) -> int | None:
        """A process whose working directory is the data directory, as that of each of a server's is."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if (entry / "cwd").samefile(self.pgdata):
                    return int(entry.name)
            except OSError:
                continue  # it has ended, or is another account's
        return None


def _server_env() -> dict[str, str]:
    """A small environment of its own: no PG* variable of the caller changes what the server does."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _shared_buffers_mb() -> int:
    """`SHARED_BUFFERS_MB`, or an eighth of a small machine's memory."""
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return max(128, min(SHARED_BUFFERS_MB, memory_mb // 8))
