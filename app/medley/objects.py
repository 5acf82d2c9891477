"""Blobs by key, in a folder or in an S3-compatible store: whole or not at all, whoever writes at the same time.

Owns the safety of writes and what a key may be; `objects_s3` has the other kind of store. Knows nothing of what the
blobs are, of tenants or of names.

    <root>/<key>             a blob
    <root>/tmp/<uuid>        a put that has not finished, or never will; never read

    StoreError
      UnsupportedStore   a URL that names no store
      ObjectMissing      there is no blob of that key
      ObjectCorrupt      what is stored is not what was put
      StoreUnavailable   the store does not answer, or not in time; try again
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 1 << 20
MAX_KEY_CHARS = 512
TEMPORARY = "tmp"
RENAME_TRIES = 200  # a delete may take an empty folder away between our making it and our using it

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9][A-Za-z0-9._=-]*)*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a named pipe in place of a file must not hold the caller.
_READ_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_IS_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link is not followed, so there is nothing


class StoreError(Exception):
    """The root of the tree."""


class UnsupportedStore(StoreError):
    pass


class ObjectMissing(StoreError):
    def __init__(self, key: str) -> None:
        super().__init__(f"there is no object {key!r} in the store")
        self.key = key


class ObjectCorrupt(StoreError):
    pass


class StoreUnavailable(StoreError):
    pass


class Objects(ABC):
    """A store of blobs. Safe to use from many threads and processes at once.

    A key is one or more segments of letters, digits, dots, dashes, underscores and equals signs, each beginning with
    a letter or a digit, joined by slashes; the first is not `tmp`. Every method that takes one raises ValueError for
    what is no key. Apart from what is said below they raise StoreUnavailable, and OSError for a disk's own troubles.
    """

    @classmethod
    def open(cls, url: str) -> Objects:
        """The store at `file:///path`, at a plain path, or at `s3://bucket/prefix`.

        Where an S3-compatible store answers, and who asks, is configuration (MEDLEY_STORE_*). Raises UnsupportedStore
        for any other URL, ConfigError for a configuration that is none.
        """
        if _SCHEME.match(url) and urlsplit(url).scheme == "s3":
            # Only who has such a store pays for its client.
            from medley.config import store_access_from_env
            from medley.objects_s3 import S3Objects

            return S3Objects.of_url(url, store_access_from_env())
        return FolderObjects(_folder_of(url))

    @abstractmethod
    def put(self, key: str, source: BinaryIO) -> int:
        """Stores what is left to read of `source`, in place of what was there. Returns its bytes.

        Atomic: until it returns, readers see what was there before, and if it raises, that is what stays. On return
        the blob outlives a loss of power.
        """

    @abstractmethod
    def open_read(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        """The blob from byte `start` on, `length` bytes of it at the most; the caller closes it.

        Beyond the blob's end there is nothing to read. Raises ObjectMissing; reading may raise ObjectCorrupt and
        StoreUnavailable, where what was read before is not to be used.
        """

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes. Raises ObjectMissing."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Deletes a blob; nothing where there is none."""

    @abstractmethod
    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with `prefix`, in no order; those that come or go meanwhile may be left out."""

    @abstractmethod
    def forget_unfinished(self, *, older_than_s: float) -> int:
        """Deletes what puts of processes that died left longer ago than this. Returns how many there were."""


class FolderObjects(Objects):
    """Blobs as files below a folder, no part of whose paths is a link."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Where the file of a key is, if it is."""
        return self.root.joinpath(*_segments(key))

    def put(self, key: str, source: BinaryIO) -> int:
        *folders, name = _segments(key)
        temporary = self.root / TEMPORARY / uuid.uuid4().hex
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            num_bytes = _write(temporary, source)
            self._publish(temporary, folders, name)
        finally:
            temporary.unlink(missing_ok=True)  # gone when it was published
        return num_bytes

    def open_read(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        file = os.fdopen(self._open(key), "rb")
        try:
            file.seek(start)
        except BaseException:
            file.close()
            raise
        return file if length is None else cast(BinaryIO, io.BufferedReader(_Part(file, length)))

    def size(self, key: str) -> int:
        number = self._open(key)
        try:
            return os.fstat(number).st_size
        finally:
            os.close(number)

    def delete(self, key: str) -> None:
        *folders, name = _segments(key)
        with contextlib.suppress(ObjectMissing), self._folder(folders, key) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            os.fsync(folder)
        # Folders that this leaves empty go too; a put that is about to use one makes it again.
        for depth in range(len(folders), 0, -1):
            try:
                self.root.joinpath(*folders[:depth]).rmdir()
            except OSError:
                return

    def keys(self, prefix: str) -> Iterator[str]:
        below = prefix.rpartition("/")[0]
        for folder, folders, names in os.walk(self.root / below, followlinks=False):
            at = Path(folder).relative_to(self.root)
            if at == Path():
                folders[:] = [name for name in folders if name != TEMPORARY]
            for name in names:
                key = (at / name).as_posix()
                if key.startswith(prefix) and _is_key(key):
                    yield key

    def forget_unfinished(self, *, older_than_s: float) -> int:
        temporary = self.root / TEMPORARY
        before_s = time.time() - older_than_s
        num_forgotten = 0
        for path in temporary.iterdir() if temporary.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # a put that ended, or another process that forgets too
                if path.lstat().st_mtime < before_s:
                    # Earlier versions put a folder at once.
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                    num_forgotten += 1
        return num_forgotten

    def _open(self, key: str) -> int:
        *folders, name = _segments(key)
        with self._folder(folders, key) as folder:
            try:
                number = os.open(name, _READ_FILE, dir_fd=folder)
            except OSError as error:
                if error.errno in _IS_NOT_THERE:
                    raise ObjectMissing(key) from None
                raise
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise ObjectMissing(key)
        return number

    @contextlib.contextmanager
    def _folder(self, folders: list[str], key: str) -> Iterator[int]:
        """A descriptor of the folder, walked to from the root without following a link."""
        numbers: list[int] = []
        try:
            numbers.append(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for name in folders:
                numbers.append(os.open(name, _READ_FOLDER, dir_fd=numbers[-1]))
            yield numbers[-1]
        except OSError as error:
            if len(numbers) <= len(folders) and error.errno in _IS_NOT_THERE:
                raise ObjectMissing(key) from None
            raise
        finally:
            for number in numbers:
                os.close(number)

    def _publish(self, temporary: Path, folders: list[str], name: str) -> None:
        """Gives a written file its name, and sees to it that the name is on the disk."""
        target = self.root.joinpath(*folders)
        for tries_left in reversed(range(RENAME_TRIES)):
            try:
                target.mkdir(parents=True, exist_ok=True)
                with self._folder(folders, name) as folder:
                    os.rename(temporary, name, dst_dir_fd=folder)
                    os.fsync(folder)
                break
            except (FileNotFoundError, FileExistsError, ObjectMissing):
                if not tries_left:
                    raise OSError(errno.ENOTDIR, "a folder of the store is a link or keeps vanishing") from None
        for depth in reversed(range(len(folders))):
            with contextlib.suppress(FileNotFoundError):  # the blob has been deleted since
                sync_folder(self.root.joinpath(*folders[:depth]))


class _Part(io.RawIOBase):
    """The next `length` bytes of a file that it owns."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._left = file, length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._file.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_key(text: str) -> bool:
    return len(text) <= MAX_KEY_CHARS and _KEY.fullmatch(text) is not None and not text.startswith(f"{TEMPORARY}/")


def check_key(key: str) -> str:
    """`key`. Raises ValueError where it is none."""
    if not _is_key(key) or key == TEMPORARY:
        raise ValueError(f"{key[:80]!r} is no key of an object")
    return key


def _segments(key: str) -> list[str]:
    return check_key(key).split("/")


def _folder_of(url: str) -> Path:
    if _SCHEME.match(url) is None:
        if not url:
            raise UnsupportedStore("the store's URL is empty; give a folder, file:///folder or s3://bucket/prefix")
        return Path(url).absolute()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UnsupportedStore(f"the store's scheme {parts.scheme!r} is not supported; give a folder, file:// or s3://")
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path.startswith("/"):
        raise UnsupportedStore("the store's file URL must have the form file:///folder")
    return Path(unquote(parts.path))


def _write(path: Path, source: BinaryIO) -> int:
    num_bytes = 0
    with path.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            num_bytes += target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return num_bytes


def sync_folder(folder: Path) -> None:
    """Brings a folder's entries to the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
