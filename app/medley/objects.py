"""The blob store: whole objects in a folder, each under a key that the service made.

Owns the folder's layout and the safety of writes: an object is there whole or not at all, whenever a process dies.
Knows no tenants, no files' names and nothing of what the bytes mean. It lies beside the adapter store:

    <root>/<key>                             an object, such as files/<tenant>/<file>
    <root>/tmp/<uuid>/object                 a put that has not finished, or never will; never read
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from medley.store import Store

CHUNK_BYTES = 1 << 20
# Keys are made by the service alone; this keeps a bug from walking out of the folder.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:[./][A-Za-z0-9][A-Za-z0-9_-]*)*")
_RESERVED = ("tmp", "sha256")  # the adapter store's


class ObjectMissing(Exception):
    """There is no object under this key."""


class Objects:
    """A blob store in a folder. Safe to use from many threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def open(cls, url: str) -> Objects:
        """The store at `file:///path`, the one that holds the adapters. Raises `store.UnsupportedStore`."""
        return cls(Store.open(url).root)

    def put(self, key: str, source: BinaryIO) -> int:
        """Stores what is left to read of `source` under `key`, in place of what is there. Returns its bytes.

        On return they are on the disk, not only in its cache. Raises OSError for the disk's own troubles.
        """
        final = self._path(key)
        temporary = self._root / "tmp" / uuid.uuid4().hex
        temporary.mkdir(parents=True)
        try:
            written = temporary / "object"
            num_bytes = 0
            with written.open("xb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    num_bytes += len(chunk)
                target.flush()
                os.fsync(target.fileno())
            final.parent.mkdir(parents=True, exist_ok=True)
            written.rename(final)
            self._sync_folders(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return num_bytes

    def open_read(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        """The object's bytes from `start` on, `length` of them at the most. Raises ObjectMissing."""
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError):
            raise ObjectMissing(key) from None
        file.seek(start)
        if length is None:
            return file
        return cast(BinaryIO, io.BufferedReader(_Part(file, length), CHUNK_BYTES))

    def size(self, key: str) -> int:
        """Bytes. Raises ObjectMissing."""
        path = self._path(key)
        if not path.is_file():
            raise ObjectMissing(key)
        return path.stat().st_size

    def delete(self, key: str) -> None:
        """One that is not there is no fault."""
        with contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with `prefix`, in no order. An object that comes or goes meanwhile may be left out."""
        # Down the folders that the prefix names whole, so that no other is walked.
        folder = self._root / prefix.rpartition("/")[0]
        for parent, _, names in os.walk(folder):
            for name in names:
                key = (Path(parent) / name).relative_to(self._root).as_posix()
                if key.startswith(prefix) and key.partition("/")[0] not in _RESERVED:
                    yield key

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key) or key.partition("/")[0] in _RESERVED:
            raise ValueError(f"{key[:80]!r} is no key: words of letters, digits, _ and -, joined by . and /")
        return self._root / key

    def _sync_folders(self, path: Path) -> None:
        """Makes the new name last: each folder from the object's up to the root may be new."""
        for folder in path.parents:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(number)
            finally:
                os.close(number)
            if folder == self._root:
                return


class _Part(io.RawIOBase):
    """The next `length` bytes of a file, which it closes."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        chunk = self._file.read(min(len(view), self._left))
        view[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)

    def close(self) -> None:
        self._file.close()
        super().close()
