"""The adapter store: immutable revisions in a folder, each found by the SHA-256 of its two files.

Owns the folder's layout and the safety of writes: a revision is there whole or not at all, whoever writes at the
same time and whenever a process dies. Judges nothing (`medley.spec.intake` does) and knows no tenants and no names.

    <root>/sha256/<first 2 digits>/<digest>/adapter_config.json, adapter_model.safetensors
    <root>/tmp/<uuid>/                       a put that has not finished, or never will; never read
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.revisions import CHUNK_BYTES, RevisionHash, is_digest

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class StoreError(Exception):
    """The tree: StoreError > UnsupportedStore (a URL), UnknownRevision (a digest), UnreadableUpload (a file)."""


class UnsupportedStore(StoreError):
    pass


class UnknownRevision(StoreError):
    pass


class UnreadableUpload(StoreError):
    pass


class Store:
    """A content-addressed store in a folder. Safe to use from many threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at `file:///path` or at a plain path. Raises UnsupportedStore for any other URL."""
        return cls(_folder_of(url))

    def put(self, config_bytes: bytes, weights_path: Path) -> str:
        """Store a revision and return its digest; one that is there already is left as it is.

        On return both files are on the disk, not only in its cache. Raises UnreadableUpload where `weights_path`
        is no plain file (a link is none) or changes while it is read, and OSError for the disk's own troubles.
        """
        temporary = self.root / "tmp" / uuid.uuid4().hex
        temporary.mkdir(parents=True)
        try:
            with _open_plain(weights_path) as source:
                digest = _write_revision(config_bytes, source, temporary)
            self._publish(temporary, digest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone when it was published
        return digest

    def path(self, digest: str) -> Path:
        """The folder that holds a revision's two files. Raises UnknownRevision where there is none."""
        if not is_digest(digest):
            raise UnknownRevision(f"{digest[:80]!r} is not a revision's digest: 64 lower-case hexadecimal digits")
        folder = self._folder(digest)
        try:
            is_folder = stat.S_ISDIR(folder.lstat().st_mode)
        except FileNotFoundError:
            is_folder = False
        if not is_folder:
            raise UnknownRevision(f"revision {digest} is not in the store {self.root}; upload the adapter again")
        return folder

    def has(self, digest: str) -> bool:
        try:
            self.path(digest)
        except UnknownRevision:
            return False
        return True

    def forget_unfinished(self, *, older_than_s: float) -> int:
        """Delete what puts of processes that died left in `tmp` longer ago than this. Returns how many there were.

        Raises OSError for the disk's own troubles.
        """
        temporary = self.root / "tmp"
        before_s = time.time() - older_than_s
        num_forgotten = 0
        for folder in temporary.iterdir() if temporary.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # a put that ended, or another process that forgets too
                if folder.stat().st_mtime < before_s:
                    shutil.rmtree(folder)
                    num_forgotten += 1
        return num_forgotten

    def _folder(self, digest: str) -> Path:
        return self.root / "sha256" / digest[:2] / digest

    def _publish(self, temporary: Path, digest: str) -> None:
        final = self._folder(digest)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(final)  # atomic, and refused where a whole revision stands already
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        for folder in (final.parent, final.parent.parent, self.root):
            _sync_folder(folder)


def _folder_of(url: str) -> Path:
    if _SCHEME.match(url) is None:
        if not url:
            raise UnsupportedStore("the adapter store's URL is empty; give a folder or file:///folder")
        return Path(url).absolute()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UnsupportedStore(
            f"the adapter store's scheme {parts.scheme!r} is not supported; give a folder or file://"
        )
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path.startswith("/"):
        raise UnsupportedStore("the adapter store's file URL must have the form file:///folder")
    return Path(unquote(parts.path))


def _open_plain(path: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: a named pipe in place of the file must not hold the caller.
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableUpload(f"cannot open the uploaded weights {path.name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UnreadableUpload(f"the uploaded weights {path.name} are not a plain file")
    return os.fdopen(number, "rb")


def _write_revision(config_bytes: bytes, source: BinaryIO, folder: Path) -> str:
    """Write both files into `folder`, synced, hashing what is written. Returns the digest."""
    with (folder / CONFIG_NAME).open("xb") as target:
        target.write(config_bytes)
        _sync(target)
    digest = RevisionHash(config_bytes, os.fstat(source.fileno()).st_size)
    with (folder / WEIGHTS_NAME).open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        _sync(target)
    _sync_folder(folder)
    try:
        return digest.hexdigest()
    except ValueError as error:
        raise UnreadableUpload(f"the uploaded weights changed while they were stored: {error}") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
