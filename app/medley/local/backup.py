"""A backup of one deployment on one machine: all of its database and of its store, as of one moment; and the way back.

    manifest.json     written last: what the rest is, so that a backup that was cut is not taken for whole
    database.dump     pg_dump's custom format, by one snapshot
    store/            the store of adapters and files, without what was being written

In a folder, or as a tar of the same. Redis holds nothing that is worth a copy. It knows no rows: what a snapshot is,
and what is to be done with a database that comes out of one, is `medley.db.recovery`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from medley.db.migrate import known_versions
from medley.db.recovery import Snapshot, create_roles, fence, snapshot
from medley.local.binaries import client_program
from medley.local.datadir import DataDir
from medley.local.embedded import EmbeddedServers
from medley.objects import FolderObjects, StoreError
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.revisions import CHUNK_BYTES, RevisionHash
from medley.store import Store

MANIFEST, DUMP, STORE = "manifest.json", "database.dump", "store"
_UNFINISHED = "tmp"  # the store's folder of what is being written


class BackupError(Exception):
    """Nothing was restored, or what was written is no backup; the text says why and what to do."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    made_at: str
    schema: str
    postgres: str
    dump_bytes: int
    dump_sha256: str
    digests: list[str]  # of the adapter revisions that the database names


def write_folder(database_url: str, store: Path, target: Path) -> Manifest:
    """Backs up into the folder `target`, which is made and must be new or empty. Raises BackupError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BackupError(f"{target} is there and not empty: name a new folder")
    fresh = target.with_name(target.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    with snapshot(database_url) as seen:
        _dump(database_url, seen, fresh / DUMP)
        for name, source in _store_files(store):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, fresh / name)
    manifest = _manifest(seen, fresh / DUMP)
    _check_store(fresh / STORE, manifest)
    (fresh / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    _sync(fresh)
    fresh.replace(target)
    return manifest


def write_stream(database_url: str, store: Path, target: BinaryIO) -> Manifest:
    """Backs up as a tar into `target`; the dump alone lies on this machine's disk meanwhile. Raises BackupError."""
    with tempfile.TemporaryDirectory(prefix="medley-backup-") as folder, snapshot(database_url) as seen:
        dump = Path(folder) / DUMP
        _dump(database_url, seen, dump)
        manifest = _manifest(seen, dump)
        with tarfile.open(fileobj=target, mode="w|") as tar:
            tar.add(dump, DUMP)
            names = set()
            for name, source in _store_files(store):
                tar.add(source, name, recursive=False)
                names.add(name)
            for digest in manifest.digests:
                if not {f"{STORE}/sha256/{digest[:2]}/{digest}/{n}" for n in (CONFIG_NAME, WEIGHTS_NAME)} <= names:
                    raise BackupError(f"revision {digest} is not in the store {store}: the backup would lack it")
            (Path(folder) / MANIFEST).write_bytes(msgspec.json.encode(manifest))
            tar.add(Path(folder) / MANIFEST, MANIFEST)
    return manifest


def _dump(database_url: str, seen: Snapshot, target: Path) -> None:
    # Under forced row-level security pg_dump refuses without the option; with it, it takes what policies show the
    # owner, which the snapshot has found to be all.
    _run(
        "pg_dump", database_url, "--format=custom", "--enable-row-security", f"--snapshot={seen.id}", f"--file={target}"
    )


def _run(program: str, database_url: str, *options: str) -> None:
    argv = [str(client_program(program)), *options, f"--dbname={database_url.replace('+psycopg', '')}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackupError(f"{program} failed: {done.stderr.strip()[-2000:]}")


def _store_files(store: Path) -> Iterator[tuple[str, Path]]:
    """(name in the backup, path) of every file of the store, in order."""
    for folder, folders, files in os.walk(store):
        here = Path(folder)
        if here == store:
            folders[:] = [name for name in folders if name != _UNFINISHED]
        folders.sort()
        for name in sorted(files):
            yield f"{STORE}/{(here / name).relative_to(store)}", here / name


def _sync(root: Path) -> None:
    """To the disk, not only to its cache: every file and folder."""
    for folder, _, files in os.walk(root):
        for path in (*(Path(folder) / name for name in files), Path(folder)):
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def _manifest(seen: Snapshot, dump: Path) -> Manifest:
    return Manifest(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        schema=seen.schema,
        postgres=seen.postgres,
        dump_bytes=dump.stat().st_size,
        dump_sha256=_sha256(dump),
        digests=seen.digests,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_store(root: Path, manifest: Manifest) -> None:
    """Raises BackupError where a revision is missing or is not what its digest says."""
    store = Store(FolderObjects(root))
    for digest in manifest.digests:
        try:
            folder = store.path(digest)
        except StoreError as error:
            raise BackupError(f"revision {digest} is missing in {root}") from error
        weights = folder / WEIGHTS_NAME
        found = RevisionHash((folder / CONFIG_NAME).read_bytes(), weights.stat().st_size)
        with weights.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                found.update(chunk)
        if found.hexdigest() != digest:
            raise BackupError(f"the files of revision {digest} in {root} are damaged: they are {found.hexdigest()}")


def restore(source: Path | BinaryIO, data_dir: Path) -> Manifest:
    """Makes the data directory that was backed up. `data_dir` must hold no database yet; killed, it holds none still.

    Raises BackupError, DataDirInUse.
    """
    data = DataDir.acquire(data_dir)
    try:
        if data.postgres.exists():
            raise BackupError(f"{data_dir} holds a database already: restore into a new data directory")
        work = data.path / "restore"
        shutil.rmtree(work, ignore_errors=True)  # of a restore that was killed
        work.mkdir(mode=0o711)
        try:
            folder = source if isinstance(source, Path) else _unpack(source, work / "unpacked")
            manifest = _read_manifest(folder)
            if (folder / STORE).is_dir():
                shutil.copytree(folder / STORE, work / STORE)
            (work / STORE).mkdir(exist_ok=True)
            _check_store(work / STORE, manifest)
            _load(folder / DUMP, DataDir.acquire(work / "data"))
            _sync(work / STORE)  # PostgreSQL has seen to its own files
            shutil.rmtree(data.store)
            (work / STORE).rename(data.store)
            # Last: from now on it is a deployment, and before it was none.
            (work / "data" / "postgres").rename(data.postgres)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        data.release()
    return manifest


def _unpack(source: BinaryIO, folder: Path) -> Path:
    folder.mkdir()
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise BackupError(f"the stream is no whole backup: {error}") from error
    return folder


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        num_bytes = (folder / DUMP).stat().st_size
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise BackupError(f"{folder} is no whole backup: {error}") from error
    if num_bytes != manifest.dump_bytes or _sha256(folder / DUMP) != manifest.dump_sha256:
        raise BackupError(f"{folder / DUMP} is damaged: its size or SHA-256 differs from the manifest's")
    if manifest.schema not in known_versions():
        raise BackupError(
            f"the backup is of schema {manifest.schema}, which this version does not know: take a newer one"
        )
    return manifest


def _load(dump: Path, data: DataDir) -> None:
    servers = EmbeddedServers(data)
    try:
        with contextlib.closing(servers):
            servers.start_postgres()
            owner = servers.database_url("medley_owner")
            create_roles(owner)
            # Its own order loads rows before it turns row-level security on.
            _run("pg_restore", owner, "--single-transaction", "--exit-on-error", str(dump))
            fence(owner)
    except RuntimeError as error:
        raise BackupError(str(error)) from error
