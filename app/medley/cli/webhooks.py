"""`medley webhooks add|list|show|update|rotate|ping|deliveries|delete`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from medley.cli.service import Session, service_command
from medley.client import Delivery, Webhook
from medley.spec.webhooks import Event

_EVENTS = click.Choice([event.value for event in Event])


@click.group()
def webhooks() -> None:
    """Endpoints that are told when batches and sweeps finish, fail, or an adapter is quarantined."""


@webhooks.command()
@click.argument("endpoint", metavar="ENDPOINT")
@click.option("--event", "events", multiple=True, type=_EVENTS, help="Ends of batches and sweeps where none is given.")
@click.option("--batch", "batch_id", help="Of this batch or sweep alone.")
@click.option("--failed-jobs", type=click.IntRange(min=1), help=f"Failures of a batch that make {Event.BATCH_FAILING}.")
@click.option("--description")
@service_command
def add(session: Session, endpoint: str, events: Sequence[str], **options: Any) -> None:
    """Register ENDPOINT, an https:// URL, and print its id and its secret, which is not shown again."""
    chosen = list(events) or [Event.BATCH_FINISHED.value, Event.SWEEP_FINISHED.value]
    if options["failed_jobs"] is not None and Event.BATCH_FAILING not in chosen:
        chosen.append(Event.BATCH_FAILING.value)
    with session.client() as client:
        webhook = client.webhooks.add(endpoint, chosen, **options)
        session.show(webhook, f"{webhook.id}\t{webhook.secret}")


@webhooks.command(name="list")
@service_command
def list_webhooks(session: Session) -> None:
    """List the endpoints."""
    with session.client() as client:
        session.show_rows(client.webhooks.list(), ("id", "state", "events", "waiting", "url"), _row)


@webhooks.command()
@click.argument("webhook_id")
@service_command
def show(session: Session, webhook_id: str) -> None:
    """Show one endpoint."""
    with session.client() as client:
        webhook = client.webhooks.get(webhook_id)
        names = [name for name in webhook.__struct_fields__ if name != "secret"]
        session.show(webhook, "\n".join(f"{name}: {getattr(webhook, name)}" for name in names))


@webhooks.command()
@click.argument("webhook_id")
@click.option("--endpoint", help="Where events go from now on, an https:// URL.")
@click.option("--event", "events", multiple=True, type=_EVENTS, help="All that it is told from now on.")
@click.option("--failed-jobs", type=click.IntRange(min=1))
@click.option("--enable/--disable", "enabled", default=None, help="Enabled again, it is sent what has waited.")
@service_command
def update(session: Session, webhook_id: str, **options: Any) -> None:
    """Change an endpoint, or enable it again."""
    # --url is the service's.
    given = {"url": options.pop("endpoint"), **options}
    changes = {name: value for name, value in given.items() if value not in (None, ())}
    if not changes:
        raise click.UsageError("change what? give --endpoint, --event, --failed-jobs, --enable or --disable")
    with session.client() as client:
        webhook = client.webhooks.update(webhook_id, **changes)
        session.show(webhook, "\t".join(_row(webhook)))


@webhooks.command()
@click.argument("webhook_id")
@click.option("--overlap", type=click.FloatRange(min=0), help="Seconds for which the old secret signs too; a day.")
@service_command
def rotate(session: Session, webhook_id: str, overlap: float | None) -> None:
    """Print a new secret; the one before signs too for a while."""
    with session.client() as client:
        webhook = client.webhooks.rotate(webhook_id, overlap_s=overlap)
        session.show(webhook, webhook.secret or "")


@webhooks.command()
@click.argument("webhook_id")
@service_command
def ping(session: Session, webhook_id: str) -> None:
    """Send the event `ping`; `deliveries` shows what became of it."""
    with session.client() as client:
        delivery = client.webhooks.ping(webhook_id)
        session.show(delivery, delivery.id)


@webhooks.command()
@click.argument("webhook_id")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True)
@service_command
def deliveries(session: Session, webhook_id: str, limit: int) -> None:
    """List the newest events of an endpoint and how they stand."""
    headers = ("id", "event", "state", "attempts", "last answer", "made")
    with session.client() as client:
        session.show_rows(client.webhooks.deliveries(webhook_id, limit=limit), headers, _delivery_row)


@webhooks.command()
@click.argument("webhook_id")
@service_command
def delete(session: Session, webhook_id: str) -> None:
    """Delete an endpoint, and the events that wait for it."""
    with session.client() as client:
        client.webhooks.delete(webhook_id)
        session.show({"deleted": webhook_id}, f"deleted {webhook_id}")


def _row(webhook: Webhook) -> tuple[str, ...]:
    state = webhook.state if webhook.disabled_reason is None else f"{webhook.state}: {webhook.disabled_reason}"
    return webhook.id, state, ",".join(webhook.events), str(webhook.num_pending), webhook.url


def _delivery_row(delivery: Delivery) -> tuple[str, ...]:
    said = delivery.error or (str(delivery.status) if delivery.status else "-")
    made = delivery.created_at.isoformat(timespec="seconds")
    return delivery.id, delivery.event, delivery.state, str(delivery.attempt), said, made
