"""`medley backup` and `medley restore`: all of a `medley up`, out of its data directory and into a new one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from medley.config import DEFAULT_DATA_DIR
from medley.db.recovery import NotDumpable
from medley.local.backup import BackupError, Manifest, write_folder, write_stream
from medley.local.backup import restore as restore_backup
from medley.local.binaries import EmbeddedServersUnavailable
from medley.local.datadir import DataDir, DataDirInUse
from medley.local.embedded import EmbeddedServers
from medley.local.status import read_status

ERRORS = (BackupError, NotDumpable, DataDirInUse, EmbeddedServersUnavailable, OSError)


@contextmanager
def _reachable(data_dir: Path) -> Iterator[tuple[str, Path]]:
    """(the owner's database URL, the store's folder) of the `medley up` there; its PostgreSQL alone where none runs."""
    status = read_status(data_dir)
    if status is not None:
        yield status.database_urls["medley_owner"], Path(unquote(urlsplit(status.store_url).path))
        return
    if not (data_dir / "postgres").exists():
        raise BackupError(f"{data_dir} holds no database: give the --data-dir of a `medley up`")
    servers = EmbeddedServers(DataDir.acquire(data_dir))
    with closing(servers):
        servers.start_postgres()
        yield servers.database_url("medley_owner"), servers.data.store


@click.command()
@click.argument("target")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA_DIR,
    show_default=True,
    help="Of a `medley up`, running or not.",
)
def backup(target: str, data_dir: Path) -> None:
    """Write the database and the adapter store, as of one moment, to the new folder TARGET, or (-) as a tar to stdout.

    Jobs run on meanwhile. Another deployment is backed up by its own PostgreSQL's tools: see the README.
    """
    if target == "-" and sys.stdout.isatty():
        raise click.UsageError("a tar is no text: send it into a file or a program")
    try:
        with _reachable(data_dir) as (url, store):
            if target == "-":
                manifest = write_stream(url, store, sys.stdout.buffer)
            else:
                manifest = write_folder(url, store, Path(target).absolute())
    except ERRORS as error:
        raise click.ClickException(str(error)) from error
    _say(manifest, "backed up")


@click.command()
@click.argument("source")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="A new one; `medley up` then goes on with it.",
)
def restore(source: str, data_dir: Path) -> None:
    """Make a data directory from the backup in the folder SOURCE, or (-) from a tar on stdin.

    Finished results are there, unfinished jobs run again, and no worker of before can write to it.
    """
    try:
        manifest = restore_backup(sys.stdin.buffer if source == "-" else Path(source), data_dir)
    except ERRORS as error:
        raise click.ClickException(str(error)) from error
    _say(manifest, "restored")


def _say(manifest: Manifest, done: str) -> None:
    click.echo(
        f"{done}: made_at={manifest.made_at} schema={manifest.schema} database_bytes={manifest.dump_bytes}"
        f" revisions={len(manifest.digests)}",
        err=True,
    )
