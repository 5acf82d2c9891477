"""The adapter store: immutable revisions, each found by the SHA-256 of its two files.

Owns which objects a revision is and when it is there: its weights are put last and deleted first, so whoever finds
them finds it whole. Judges nothing (`medley.spec.intake` does), and knows no tenants and no names.

    sha256/<first 2 digits>/<digest>/adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from medley.objects import FolderObjects, ObjectCorrupt, ObjectMissing, Objects, StoreError
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.peft_config import MAX_CONFIG_BYTES
from medley.spec.revisions import CHUNK_BYTES, RevisionHash, is_digest, revision_digest

PREFIX = "sha256"


class UnknownRevision(StoreError):
    pass


class UnreadableUpload(StoreError):
    pass


class Store:
    """A content-addressed store of adapters. Safe to use from many threads and processes at once.

    Apart from what is said below, methods raise StoreUnavailable, and OSError for a disk's own troubles.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at `file:///path`, at a plain path or at `s3://bucket/prefix`. Raises UnsupportedStore."""
        return cls(Objects.open(url))

    @property
    def is_local(self) -> bool:
        """Whether revisions are folders of this machine, which `path` gives; else they are to be fetched first."""
        return isinstance(self.objects, FolderObjects)

    def put(self, config_bytes: bytes, weights_path: Path) -> str:
        """Store a revision and return its digest; one that is there already is left as it is.

        On return both files are where a loss of power leaves them. Raises UnreadableUpload where `weights_path` is no
        plain file (a link is none) or changes while it is read.
        """
        with _open_plain(weights_path) as source:
            found_at = _age(source)
            digest = revision_digest(config_bytes, source)
            if self.has(digest):
                return digest
            config_key, weights_key = _keys(digest)
            self.objects.put(config_key, io.BytesIO(config_bytes))
            source.seek(0)
            self.objects.put(weights_key, source)
            if _age(source) != found_at:
                self.delete(digest)
                raise UnreadableUpload("the uploaded weights changed while they were stored")
        return digest

    def has(self, digest: str) -> bool:
        if not is_digest(digest):
            return False
        try:
            self.objects.size(_keys(digest)[1])
        except ObjectMissing:
            return False
        return True

    def path(self, digest: str) -> Path:
        """The folder that holds a revision's two files, in a store that is local. Raises UnknownRevision."""
        assert isinstance(self.objects, FolderObjects), "a remote revision is fetched, it has no path"
        if not is_digest(digest):
            raise UnknownRevision(f"{digest[:80]!r} is not a revision's digest: 64 lower-case hexadecimal digits")
        if not self.has(digest):
            raise _unknown(digest)
        return self.objects.path(_keys(digest)[1]).parent

    def fetch(self, digest: str, folder: Path) -> int:
        """Writes a revision's two files into `folder`, which is there and empty, and checks them against the digest.

        Returns their bytes. They are not synced. Raises UnknownRevision, ObjectCorrupt.
        """
        if not is_digest(digest):
            raise UnknownRevision(f"{digest[:80]!r} is not a revision's digest: 64 lower-case hexadecimal digits")
        config_key, weights_key = _keys(digest)
        try:
            with self.objects.open_read(config_key) as config:
                config_bytes = config.read(MAX_CONFIG_BYTES + 1)
            (folder / CONFIG_NAME).write_bytes(config_bytes)
            weights_bytes = self.objects.size(weights_key)
            found = RevisionHash(config_bytes, weights_bytes)
            with self.objects.open_read(weights_key) as source, (folder / WEIGHTS_NAME).open("xb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    found.update(chunk)
                    target.write(chunk)
        except ObjectMissing:
            raise _unknown(digest) from None
        if not found.matches(digest):
            raise ObjectCorrupt(f"revision {digest} is damaged in the store; upload the adapter again")
        return len(config_bytes) + weights_bytes

    def size(self, digest: str) -> int:
        """Bytes of both files. Raises UnknownRevision."""
        try:
            return sum(self.objects.size(key) for key in _keys(digest))
        except ObjectMissing:
            raise _unknown(digest) from None

    def delete(self, digest: str) -> None:
        """Deletes a revision's files; nothing where there are none."""
        config_key, weights_key = _keys(digest)
        self.objects.delete(weights_key)
        self.objects.delete(config_key)

    def digests(self) -> Iterator[str]:
        """Every revision that is there."""
        for key in self.objects.keys(f"{PREFIX}/"):
            *_, digest, name = key.split("/")
            if name == WEIGHTS_NAME and is_digest(digest):
                yield digest

    def forget_unfinished(self, *, older_than_s: float) -> int:
        """Deletes what puts of processes that died left longer ago than this. Returns how many there were."""
        return self.objects.forget_unfinished(older_than_s=older_than_s)


def _keys(digest: str) -> tuple[str, str]:
    """The objects of its configuration and its weights."""
    folder = f"{PREFIX}/{digest[:2]}/{digest}"
    return f"{folder}/{CONFIG_NAME}", f"{folder}/{WEIGHTS_NAME}"


def _unknown(digest: str) -> UnknownRevision:
    return UnknownRevision(f"revision {digest} is not in the store; upload the adapter again")


def _age(file: BinaryIO) -> tuple[int, int]:
    """What changes when the file does."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


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
