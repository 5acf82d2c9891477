"""`medley pause`, `resume`, `update`, `retry`: what a batch or a sweep can be told after it was made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from medley.cli.jobs import describe, shown_time
from medley.cli.service import MANY_RETRIES, Session, service_command


@click.command()
@click.argument("target")
@service_command
def pause(session: Session, target: str) -> None:
    """Hold what waits of a batch or a sweep, and put back what runs, with the tokens it has."""
    with session.client() as client:
        status = client.find(target).pause()
        session.show(status, f"{status.id}\t{status.state}")


@click.command()
@click.argument("target")
@service_command
def resume(session: Session, target: str) -> None:
    """Let a paused batch or sweep go on."""
    with session.client() as client:
        status = client.find(target).resume()
        session.show(status, f"{status.id}\t{status.state}")


@click.command()
@click.argument("target")
@click.option("--priority", type=click.Choice(["low", "normal", "high"]))
@click.option("--deadline", help='A time with its offset, as 2026-01-31T12:00+00:00, or "none".')
@service_command
def update(session: Session, target: str, priority: str | None, deadline: str | None) -> None:
    """Change the priority and the deadline of what has not ended of a batch or a sweep."""
    if priority is None and deadline is None:
        raise click.UsageError("change what? give --priority or --deadline")
    changes: dict[str, Any] = {} if priority is None else {"priority": priority}
    if deadline is not None:
        changes["deadline_at"] = _read_time(deadline)
    with session.client() as client:
        status = client.find(target).update(**changes)
        session.show(status, f"{status.id}\t{status.priority}\tdeadline: {shown_time(status.deadline_at)}")


@click.command()
@click.argument("target")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["failed", "cancelled", "expired"]),
    help="Which ends; failed where none is given; may be repeated.",
)
@click.option("--code", "codes", multiple=True, help="Failures with this code alone; may be repeated.")
@click.option("--retryable", is_flag=True, help="Failures that may pass by themselves alone.")
@click.option("--wait/--no-wait", default=False, show_default=True, help="Follow the batch to its end.")
@service_command
def retry(
    session: Session, target: str, states: Sequence[str], codes: Sequence[str], retryable: bool, wait: bool
) -> None:
    """Run jobs of a batch or a sweep that ended without a result again, each once an end."""
    if codes and retryable:
        raise click.UsageError("give --code or --retryable, not both")
    with session.client(retries=MANY_RETRIES) as client:
        batch = client.find(target)
        batch.retry(states=states or ("failed",), codes="retryable" if retryable else codes or None)
        if wait:
            batch.wait(progress=True)
        session.show(batch.status, describe(batch.status))


def _read_time(text: str) -> datetime | None:
    if text == "none":
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        read = None
    if read is None or read.tzinfo is None:
        raise click.BadParameter(f'got {text!r}, wanted a time with its offset, or "none"', param_hint="--deadline")
    return read
