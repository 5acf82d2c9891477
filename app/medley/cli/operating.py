"""How the operator's commands reach a deployment: its database as medley_owner, and its store."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
from sqlalchemy import Connection, Engine, create_engine

from medley.config import DEFAULT_DATA_DIR, database_url_from_env, redis_url_from_env, store_url_from_env
from medley.db.audit import OPERATOR, record
from medley.db.tenants import find_tenant
from medley.local.status import StackStatus, read_status

F = TypeVar("F", bound=Callable[..., Any])

data_dir_option: Callable[[F], F] = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA_DIR,
    show_default=True,
    help="Of the running `medley up`, unless MEDLEY_DATABASE_URL is set.",
)


def operator_database_url(data_dir: Path) -> str:
    """MEDLEY_DATABASE_URL, else the owner's of the `medley up` that runs on `data_dir`. Raises ClickException."""
    return database_url_from_env() or _running(data_dir).database_urls["medley_owner"]


def operator_redis_url(data_dir: Path) -> str | None:
    """MEDLEY_REDIS_URL, else that of the `medley up` where MEDLEY_DATABASE_URL is not set; None where there is none."""
    if database_url_from_env() is None:
        return _running(data_dir).redis_url
    return redis_url_from_env()


def operator_store_url(data_dir: Path) -> str:
    """MEDLEY_STORE_URL where MEDLEY_DATABASE_URL is set, else that of the `medley up`. Raises ClickException."""
    if database_url_from_env() is None:
        return _running(data_dir).store_url
    url = store_url_from_env()
    if url is None:
        raise click.ClickException("MEDLEY_STORE_URL: got nothing, wanted the adapter store that the service uses")
    return url


def _running(data_dir: Path) -> StackStatus:
    status = read_status(data_dir)
    if status is None:
        raise click.ClickException(
            f"no `medley up` runs on {data_dir}: give its --data-dir, or set MEDLEY_DATABASE_URL"
        )
    return status


@contextmanager
def owner_engine(data_dir: Path) -> Iterator[Engine]:
    """Connections as medley_owner, for who looks again and again. Raises ClickException where none can be found."""
    engine = create_engine(operator_database_url(data_dir), hide_parameters=True, pool_pre_ping=True)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def as_owner(data_dir: Path) -> Iterator[Connection]:
    """One transaction as medley_owner. Raises ClickException where there is no database to be found."""
    with owner_engine(data_dir) as engine, engine.begin() as connection:
        yield connection


def tenant_of(conn: Connection, name: str) -> UUID:
    """The tenant of that name. Raises BadParameter."""
    tenant = find_tenant(conn, name)
    if tenant is None:
        raise click.BadParameter(f"there is no tenant {name!r}; `medley tenants list` shows them", param_hint="NAME")
    return tenant


def note(conn: Connection, tenant: UUID, action: str, object_: str, **details: object) -> None:
    """Adds to the audit log, with the account that runs the command."""
    record(conn, tenant, OPERATOR, action, object_, {"operator": getpass.getuser(), **details})
