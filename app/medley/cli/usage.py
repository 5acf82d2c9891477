"""`medley usage`: the tokens that a tenant's jobs took, by day, adapter or revision."""

from __future__ import annotations

from datetime import datetime

import click

from medley.cli.service import Session, service_command
from medley.client.types import UsageRow

_DAY = click.DateTime(["%Y-%m-%d"])


@click.command()
@click.option("--from", "first", type=_DAY, help="The first day (UTC); 30 days in all where none is given.")
@click.option("--to", "last", type=_DAY, help="The last day; today where none is given.")
@click.option("--by", type=click.Choice(["day", "adapter", "revision"]), default="day", show_default=True)
@service_command
def usage(session: Session, first: datetime | None, last: datetime | None, by: str) -> None:
    """Show the jobs that workers ended and the tokens they took."""
    with session.client() as client:
        report = client.usage(first and first.date(), last and last.date(), by=by)
    if session.as_json:
        session.show(report, "")
        return

    def row(found: UsageRow) -> tuple[str, ...]:
        numbers = (str(found.num_jobs), str(found.prompt_tokens), str(found.completion_tokens))
        if found is report.total:
            return "total", *numbers
        name = found.day.isoformat() if found.day else found.adapter or "(base)"
        if found.revision is not None:
            name = f"{found.adapter or ''}@{found.revision}"
        return name, *numbers

    session.show_rows([*report.rows, report.total], (by, "jobs", "prompt tokens", "completion tokens"), row)
