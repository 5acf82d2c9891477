"""The data directory of one deployment on one machine: its layout, who holds it, and its runtime directory.

    <data_dir>/lock       held with flock by the running supervisor; says who that is
    <data_dir>/up.json    the running stack, for other commands (written by `stack.py`)
    <data_dir>/postgres/  PGDATA, owned by the unprivileged account where the supervisor is root
    <data_dir>/store/     adapters
    /tmp/medley-*/        sockets (0700) and, for root, the servers' binaries; gone after each run

It knows nothing of servers or processes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from medley.config import runtime_root

_RUNTIME_PREFIX = "medley-"


class DataDirInUse(Exception):
    """Another supervisor holds the directory."""

    def __init__(self, path: Path, pid: int | None, since: str | None) -> None:
        who = "another process" if pid is None else f"process {pid}"
        when = "" if since is None else f" since {since}"
        super().__init__(f"{path} is in use by {who}{when}: stop it, or choose another --data-dir")
        self.pid = pid
        self.since = since


class DataDir:
    """Exclusive hold of a data directory from `acquire` to `release` (or this process's death)."""

    def __init__(self, path: Path, runtime: Path, lock_fd: int) -> None:
        self.path = path
        self.runtime = runtime
        self._lock_fd: int | None = lock_fd

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def sockets(self) -> Path:
        return self.runtime / "s"

    @classmethod
    def acquire(cls, path: Path) -> DataDir:
        """Create `path` where needed and hold it. Raises `DataDirInUse`."""
        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _Holder.read(fd)
            os.close(fd)
            raise DataDirInUse(path, holder.pid, holder.since) from None
        _remove_runtime(_Holder.read(fd).runtime)  # of a supervisor that was killed
        runtime = Path(tempfile.mkdtemp(prefix=_RUNTIME_PREFIX, dir=runtime_root()))
        # Searchable, so that the servers' account reaches its own folders below; they are 0700.
        runtime.chmod(0o711)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        _Holder(os.getpid(), since, str(runtime)).write(fd)
        (path / "store").mkdir(exist_ok=True)
        return cls(path, runtime, fd)

    def release(self) -> None:
        """Remove the runtime directory and let go; the second call does nothing."""
        if self._lock_fd is None:
            return
        shutil.rmtree(self.runtime, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None


class _Holder(msgspec.Struct, frozen=True):
    """What the lock file says of the process that holds it, or held it last."""

    pid: int | None = None
    since: str | None = None
    runtime: str | None = None

    @classmethod
    def read(cls, fd: int) -> _Holder:
        try:
            return msgspec.json.decode(os.pread(fd, 4096, 0), type=cls)
        except msgspec.DecodeError:
            return cls()

    def write(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(self), 0)


def _remove_runtime(recorded: str | None) -> None:
    if recorded is None:
        return
    path = Path(recorded)
    if path.name.startswith(_RUNTIME_PREFIX) and path.parent == runtime_root() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
