"""`medley tenants retention|delete|keep`: how long a tenant's data is kept, and its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import click
import msgspec
from sqlalchemy import Engine, create_engine

from medley.cli.operating import data_dir_option, operator_database_url, operator_store_url
from medley.db import erasure
from medley.db.erasure import Certificate
from medley.db.retention import MAX_DAYS, set_retention
from medley.store import Store
from medley.tasks.erase import erase, stop

POLL_S = 0.2
DAY_S = 86_400.0


@contextmanager
def _owner(data_dir: Path) -> Iterator[Engine]:
    engine = create_engine(operator_database_url(data_dir))
    try:
        yield engine
    finally:
        engine.dispose()


def _unknown(name: str) -> click.BadParameter:
    return click.BadParameter(f"there is no tenant {name!r}", param_hint="NAME")


@click.command()
@click.argument("name")
@click.argument("days", type=click.IntRange(1, MAX_DAYS))
@data_dir_option
def retention(name: str, days: int, data_dir: Path) -> None:
    """Keep what NAME has for DAYS after the end of each batch.

    Fewer days hide what is older at once and remove it soon; more bring back what has not been removed yet.
    """
    with _owner(data_dir) as engine, engine.begin() as conn:
        if not set_retention(conn, name, days):
            raise _unknown(name)
    click.echo(f"{name}\t{days} days")


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask for the name again.")
@click.option("--grace-days", type=click.FloatRange(0), default=0, show_default=True, help="Close now, erase then.")
@click.option("--json", "as_json", is_flag=True, help="The certificate as a JSON object.")
@data_dir_option
def delete(name: str, yes: bool, grace_days: float, as_json: bool, data_dir: Path) -> None:
    """Delete the tenant NAME and all that it has.

    Its keys end, what waits is cancelled, what runs is aborted; then every row and file of it is erased. Prints how
    much that was. Stopped in the middle, the service goes on with it, or the same command.
    """
    if not yes and click.prompt(f"All of {name!r} will be erased. Its name again") != name:
        raise click.ClickException("that is another name; nothing was done")
    with _owner(data_dir) as engine:
        store = Store.open(operator_store_url(data_dir))
        tenant = _close(engine, name, grace_days)
        if grace_days:
            click.echo(f"{name} is closed; `medley tenants keep {name}` calls the erasure in {grace_days:g} days off")
            return
        try:
            certificate = _erase(engine, store, tenant)
        except erasure.NotErasable as error:
            raise click.ClickException(str(error)) from error
    click.echo(_json(certificate) if as_json else _table(certificate))


def _close(engine: Engine, name: str, grace_days: float) -> UUID:
    with engine.begin() as conn:
        tenant = erasure.find_tenant(conn, name)
        if tenant is None:
            begun = [c.tenant for c in erasure.read_certificates(conn) if c.name == name and c.finished_at is None]
            if not begun:
                raise _unknown(name)
            return begun[0]
        erasure.close(conn, tenant, grace_s=grace_days * DAY_S)
    return tenant


def _erase(engine: Engine, store: Store, tenant: UUID) -> Certificate:
    """Waits for the workers, who look each second, and for the leases of those that do not."""
    has_said = False
    while num_running := stop(engine, tenant):
        if not has_said:
            click.echo(f"{num_running} jobs are being aborted", err=True)
            has_said = True
        time.sleep(POLL_S)
    certificate = erase(engine, store, tenant)
    if certificate is None:
        raise click.ClickException("the deletion was called off meanwhile")
    return certificate


def _json(certificate: Certificate) -> str:
    return msgspec.json.encode(certificate).decode()


def _table(certificate: Certificate) -> str:
    lines = [
        f"{certificate.name} ({certificate.tenant}) was erased at {certificate.finished_at}",
        *(f"{num_rows:>12}  {table}" for table, num_rows in sorted(certificate.num_rows.items())),
        f"{certificate.num_revisions:>12}  adapter revisions' files"
        + (f" ({certificate.num_shared} more stay: another tenant has the same)" if certificate.num_shared else ""),
    ]
    return "\n".join(lines)


@click.command()
@click.argument("name")
@data_dir_option
def keep(name: str, data_dir: Path) -> None:
    """Call the deletion of NAME off, while none of it is erased.

    Its keys stay revoked (`medley tenants add NAME` makes one), what was cancelled stays cancelled.
    """
    with _owner(data_dir) as engine, engine.begin() as conn:
        tenant = erasure.find_tenant(conn, name)
        if tenant is None:
            raise _unknown(name)
        if not erasure.keep(conn, tenant):
            raise click.ClickException(f"{name} is being erased already")
    click.echo(f"{name} is kept")
