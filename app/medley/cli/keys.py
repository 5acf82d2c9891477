"""`medley keys create|list|rotate|revoke`: a tenant's keys, by one of its admin keys or by the operator.

Over HTTP with MEDLEY_API_KEY; with `--tenant NAME` at the database, as medley_owner.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from medley.cli.service import Session, service_command
from medley.client.types import Key
from medley.config import DEFAULT_DATA_DIR
from medley.spec.scopes import Scope

F = TypeVar("F", bound=Callable[..., Any])
HEADERS = ("id", "name", "state", "scopes", "expires", "last used")


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys (with an admin key, or --tenant as the operator)."""


def operator_options(command: F) -> F:
    """Adds --tenant and --data-dir."""
    folder = click.Path(file_okay=False, path_type=Path)
    text = "With --tenant: of the running `medley up`, unless MEDLEY_DATABASE_URL is set."
    command = click.option("--data-dir", type=folder, default=DEFAULT_DATA_DIR, show_default=True, help=text)(command)
    return click.option("--tenant", help="Act as the operator, at the database.")(command)


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="May be repeated; without it all but admin.",
)
@click.option("--days", type=click.FloatRange(0, min_open=True), help="How long it lives; without it, until revoked.")
@operator_options
@service_command
def create(
    session: Session, name: str, scopes: tuple[str, ...], days: float | None, tenant: str | None, data_dir: Path
) -> None:
    """Make a key called NAME and print it (shown this once)."""
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    if tenant is not None:
        from medley.cli import operator_keys

        key = operator_keys.create(data_dir, tenant, name, scopes, expires_at)
    else:
        with session.client() as client:
            key = client.keys.create(name, scopes=scopes or None, expires_at=expires_at)
    _show_made(session, key)


@keys.command(name="list")
@operator_options
@service_command
def list_all(session: Session, tenant: str | None, data_dir: Path) -> None:
    """List the keys, newest first, ended ones too."""
    if tenant is not None:
        from medley.cli import operator_keys

        session.show_rows(operator_keys.list_all(data_dir, tenant), HEADERS, _row)
        return
    with session.client() as client:
        session.show_rows(client.keys.list(), HEADERS, _row)


@keys.command()
@click.argument("key_id")
@click.option(
    "--old-hours",
    type=click.FloatRange(0),
    help="End the old key after so long; without it, it lives until it is revoked.",
)
@operator_options
@service_command
def rotate(session: Session, key_id: str, old_hours: float | None, tenant: str | None, data_dir: Path) -> None:
    """Make a successor of KEY_ID (mk_...) and print it; both work until the old one is revoked."""
    old_lives_s = None if old_hours is None else old_hours * 3600
    if tenant is not None:
        from medley.cli import operator_keys

        key = operator_keys.rotate(data_dir, tenant, key_id, old_lives_s)
    else:
        with session.client() as client:
            key = client.keys.rotate(key_id, old_lives_s=old_lives_s)
    _show_made(session, key)


@keys.command()
@click.argument("key_id")
@operator_options
@service_command
def revoke(session: Session, key_id: str, tenant: str | None, data_dir: Path) -> None:
    """End KEY_ID (mk_...) for good, within seconds."""
    if tenant is not None:
        from medley.cli import operator_keys

        operator_keys.revoke(data_dir, tenant, key_id)
    else:
        with session.client() as client:
            client.keys.revoke(key_id)
    session.show({"revoked": key_id}, f"revoked {key_id}")


def _show_made(session: Session, key: Key) -> None:
    if key.api_key is None:
        session.fail(f"the answer with {key.id} was lost, and it is shown once: revoke it and make another")
        raise SystemExit(1)
    session.show(key, key.api_key)


def _row(key: Key) -> tuple[str, ...]:
    expires, used = _shown(key.expires_at, "never"), _shown(key.last_used_at, "never")
    return key.id, key.name or "", key.state, ",".join(key.scopes), expires, used


def _shown(at: datetime | None, otherwise: str) -> str:
    return otherwise if at is None else at.isoformat(timespec="seconds")
