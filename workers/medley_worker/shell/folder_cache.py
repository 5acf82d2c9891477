"""Adapters of a remote store as folders of this machine: content-addressed, within a limit, shared by its processes.

Owns the folder's layout, who uses what in it, and what goes when room is needed: the least recently used that no
process uses. Use is a shared lock on the revision's folder, which the kernel takes back from a process that dies.

    <root>/<first 2 digits>/<digest>/     both files, checked against the digest before they came here
    <root>/tmp/<uuid>/                    a fetch that has not finished, or never will; or what is being deleted
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

STALE_S = 3600.0  # no fetch takes this long


class NoRoom(Exception):
    """What is in use leaves too little room now."""


class FolderCache:
    """The folder. For many threads and processes; raises OSError for the disk's own troubles."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        """Makes the folder. Raises PermissionError where another account could write to it."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = root.lstat()
        if root.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(
                errno.EPERM, "the adapter cache must be this account's own folder, mode 0700", str(root)
            )
        self.root, self.limit_bytes = root, limit_bytes
        self._temporary = root / "tmp"
        self._temporary.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._used: dict[str, int] = {}  # digest -> a descriptor of its folder, locked
        self._reserved_bytes = 0  # of fetches of this process
        self._forget_unfinished()

    def use(self, digest: str) -> Path | None:
        """The folder of a revision, which stays until `release`; None where it is not here."""
        path = self._path(digest)
        with self._lock:
            if digest not in self._used:
                number = _locked(path)
                if number is None:
                    return None
                self._used[digest] = number
            os.utime(self._used[digest])
        return path

    def release(self, wanted: Collection[str]) -> None:
        """Lets go of everything but `wanted`."""
        with self._lock:
            for digest in [digest for digest in self._used if digest not in wanted]:
                os.close(self._used.pop(digest))

    def add(self, digest: str, num_bytes: int, fetch: Callable[[Path], object]) -> None:
        """Has `fetch` write a revision's files into a folder, and uses it. What it raises is raised.

        num_bytes: what the files take. Raises NoRoom, or OSError (ENOSPC) for what can never fit.
        """
        if num_bytes > self.limit_bytes:
            reason = f"an adapter of {num_bytes} bytes is larger than the worker's cache of {self.limit_bytes}"
            raise OSError(errno.ENOSPC, reason)
        temporary = self._temporary / uuid.uuid4().hex
        with self._room(num_bytes):
            try:
                temporary.mkdir()
                fetch(temporary)
                path = self._path(digest)
                path.parent.mkdir(exist_ok=True)
                try:
                    temporary.rename(path)  # refused where another process has brought it meanwhile
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self.use(digest)

    @contextlib.contextmanager
    def _room(self, num_bytes: int) -> Iterator[None]:
        """Room for this many bytes, made by deleting what nobody uses, the longest unused first."""
        with self._lock:
            present = sorted(self._present())
            free_bytes = self.limit_bytes - self._reserved_bytes - sum(size for _, size, _ in present)
            for _, size, path in present:
                if free_bytes >= num_bytes:
                    break
                if self._evict(path):
                    free_bytes += size
            if free_bytes < num_bytes:
                raise NoRoom(f"{num_bytes} bytes wanted, {free_bytes} free beside what is in use")
            self._reserved_bytes += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved_bytes -= num_bytes

    def _present(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, folder) of each revision here."""
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                size = sum(entry.stat().st_size for entry in os.scandir(path))
                yield path.stat().st_mtime, size, path

    def _evict(self, path: Path) -> bool:
        number = _locked(path, exclusive=True)
        if number is None:
            return False
        gone = self._temporary / uuid.uuid4().hex
        try:
            path.rename(gone)
        finally:
            os.close(number)
        shutil.rmtree(gone, ignore_errors=True)
        return True

    def _path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _forget_unfinished(self) -> None:
        before_s = time.time() - STALE_S
        for path in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before_s:
                    shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path, *, exclusive: bool = False) -> int | None:
    """A descriptor of the folder with a lock on it; None where there is none, or others' locks are in the way."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        # Before the lock it may have been taken away, and another put in its place.
        if os.fstat(number).st_ino == path.stat().st_ino:
            return number
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(number)
        raise
    os.close(number)
    return None
