"""`medley tenants add|list|limit`: who may use the service and how much of it, for its operator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy.exc import IntegrityError

from medley.cli.operating import as_owner, data_dir_option, note, tenant_of
from medley.cli.tenant_data import delete, keep, retention
from medley.config import Quotas
from medley.db.batches import TenantClosing
from medley.db.keys import NewKey, add_key, public_key_id
from medley.db.quotas import QUOTA_NAMES, set_limits
from medley.db.tenants import ensure_tenant, list_tenants

WHOLE_QUOTAS = tuple(name for name in QUOTA_NAMES if name != "requests_per_s")


@click.group()
def tenants() -> None:
    """Add tenants, show them, set their limits and how long they keep data, delete them (as medley_owner)."""


@tenants.command()
@click.argument("name")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="As a JSON object.")
def add(name: str, data_dir: Path, as_json: bool) -> None:
    """Make the tenant NAME where it is new, and print a new API key of every scope for it (shown this once)."""
    key = NewKey.draw()
    try:
        with as_owner(data_dir) as conn:
            tenant, is_new = ensure_tenant(conn, name)
            if is_new:
                note(conn, tenant, "tenant.create", name)
            add_key(conn, tenant, key)
            note(conn, tenant, "key.create", public_key_id(key.id))
    except TenantClosing:
        raise click.ClickException(f"{name} is being deleted; `medley tenants keep {name}` calls it off") from None
    except IntegrityError:
        raise click.BadParameter(
            f"got {name!r}, wanted up to 63 of a-z, 0-9, _ and -, beginning with a letter or digit",
            param_hint="NAME",
        ) from None
    click.echo(msgspec.json.encode({"tenant": name, "api_key": key.text}) if as_json else key.text)


@tenants.command(name="list")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def list_all(data_dir: Path, as_json: bool) -> None:
    """List the tenants: what they have in the queue, and the limits that are theirs alone."""
    with as_owner(data_dir) as conn:
        rows = list_tenants(conn)
    if not as_json:
        click.echo("name\tweight\tjobs\tbytes\tlimits")
    for row in rows:
        limits = {name: getattr(row, name) for name in QUOTA_NAMES if getattr(row, name) is not None}
        if as_json:
            used = {"queued_jobs": row.used_jobs, "queued_bytes": row.used_bytes}
            click.echo(msgspec.json.encode({"name": row.name, "weight": row.weight, "used": used, "limits": limits}))
        else:
            own = " ".join(f"{name}={value}" for name, value in limits.items())
            click.echo(f"{row.name}\t{row.weight:g}\t{row.used_jobs}\t{row.used_bytes}\t{own}")


class _Limit(click.ParamType[Any]):
    """A number, or `default` for what the service is configured with."""

    name = "number|default"

    def __init__(self, quota: str) -> None:
        self._kind: type[float] = int if quota in WHOLE_QUOTAS else float

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "default":
            return "default"
        try:
            number = self._kind(value)
        except ValueError:
            number = self._kind(-1)
        if not 0 <= number < 2**63 or (self._kind is float and number == 0):
            whole = "a whole number of at least 0" if self._kind is int else "a number above 0"
            self.fail(f"got {value!r}, wanted {whole}, or default", param, ctx)
        return number


def _limit_options(command: Any) -> Any:
    for field in reversed(dataclasses.fields(Quotas)):
        flag = "--" + field.name.replace("_", "-")
        command = click.option(flag, field.name, type=_Limit(field.name), help=f"Configured: {field.default:,}.")(
            command
        )
    return command


@tenants.command()
@click.argument("name")
@data_dir_option
@_limit_options
def limit(name: str, data_dir: Path, **limits: float | str | None) -> None:
    """Set limits of the tenant NAME; `default` goes back to what the service is configured with."""
    changes = {quota: None if value == "default" else value for quota, value in limits.items() if value is not None}
    if not changes:
        raise click.UsageError("give at least one limit")
    numbers: dict[str, float | None] = {k: v for k, v in changes.items() if not isinstance(v, str)}
    with as_owner(data_dir) as conn:
        tenant = tenant_of(conn, name)
        set_limits(conn, tenant, numbers)
        note(conn, tenant, "tenant.limit", name, **numbers)
    for quota, number in numbers.items():
        click.echo(f"{quota}: {'as configured' if number is None else f'{number:g}'}")


for command in (retention, delete, keep):
    tenants.add_command(command)
