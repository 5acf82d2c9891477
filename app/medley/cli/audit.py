"""`medley audit` and `medley limits`: what was changed by hand, and what a tenant may have and has."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from medley.cli.keys import operator_options
from medley.cli.service import Session, service_command
from medley.client.types import AuditEntry, Limits

HEADERS = ("at", "by", "action", "object", "details")


@click.command()
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The newest so many.")
@operator_options
@service_command
def audit(session: Session, limit: int, tenant: str | None, data_dir: Path) -> None:
    """Show who changed what by hand, newest first (with an admin key, or --tenant as the operator)."""
    if tenant is not None:
        from medley.cli import operator_keys

        session.show_rows(operator_keys.audit(data_dir, tenant, limit), HEADERS, _row)
        return
    with session.client() as client:
        session.show_rows(client.audit(limit=limit), HEADERS, _row)


@click.command()
@service_command
def limits(session: Session) -> None:
    """Show what the tenant may have, and what it has."""
    with session.client() as client:
        found: Limits = client.limits()
    lines = [f"{name}\t{_amount(quota.used)}\t{_amount(quota.limit)}" for name, quota in found.quotas.items()]
    session.show(found, "\n".join(["name\tused\tlimit", *lines]))


def _amount(value: float | None) -> str:
    """In full: bytes and jobs are compared digit by digit."""
    if value is None:
        return ""
    return f"{int(value):,}" if value.is_integer() else f"{value:,}"


def _row(entry: AuditEntry) -> tuple[str, ...]:
    who = entry.key_id or str(entry.details.get("operator", "the operator"))
    details = {name: value for name, value in entry.details.items() if name != "operator"}
    shown = msgspec.json.encode(details).decode() if details else ""
    return entry.at.isoformat(timespec="seconds"), who, entry.action, entry.object, shown
