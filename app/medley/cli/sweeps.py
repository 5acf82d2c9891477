"""`medley sweep`: prompts x adapters as one durable job, followed to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from medley.cli.progress import watch
from medley.cli.service import MANY_RETRIES, Session, sampling_options, service_command
from medley.client.types import SweepReport
from medley.spec.statistics import ReportColumn

HEADERS = ("adapter", "correct", "accuracy", "95 %", "base", "unsuccessful")


@click.command()
@click.argument("name")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--adapters", "patterns", multiple=True, help='Names and patterns, such as "acme/*"; may be repeated.')
@click.option("--include-base", is_flag=True, help="Run the base model as well.")
@click.option("--seeds", help="Seeds, separated by commas: every cell once with each.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the sweep to its end.")
@click.option("--report", "is_report", is_flag=True, help="Only print the report of what has ended.")
@sampling_options
@service_command
def sweep(session: Session, name: str, prompts: Path | None, patterns: Sequence[str], **options: Any) -> None:
    """Run PROMPTS over adapters as sweep NAME and print the report; the same again resumes it.

    PROMPTS is a JSONL file: a text a line, or prompt, expected, custom_id. Without it, print NAME's report.
    """
    is_report = options["is_report"] or prompts is None
    if is_report and patterns:
        raise click.UsageError("--adapters runs a sweep, which wants a file of PROMPTS and no --report")
    if not is_report and not patterns and not options["include_base"]:
        raise click.UsageError('which adapters? give --adapters, for example --adapters "*"')
    seeds = _read_seeds(options["seeds"])
    with session.client(retries=MANY_RETRIES) as client:
        if is_report or prompts is None:
            show_report(session, client.get_sweep(name).report())
            return
        handle = client.sweep(
            name,
            _read_prompts(prompts),
            adapters=patterns,
            include_base=options["include_base"],
            seeds=seeds,
            **options["sampling"],
        )
        if not options["wait"]:
            session.show(handle.status, handle.id)
            return
        watch(name, handle)
        show_report(session, handle.report())


def _read_seeds(text: str | None) -> list[int] | None:
    try:
        return [int(seed) for seed in text.split(",")] if text else None
    except ValueError as error:
        raise click.BadParameter(f"got {text!r}, wanted whole numbers between commas", param_hint="--seeds") from error


def _read_prompts(path: Path) -> list[str | dict[str, Any]]:
    rows: list[str | dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                rows.append(msgspec.json.decode(line, type=str | dict[str, Any]))
            except msgspec.DecodeError as error:
                raise click.BadParameter(f"line {number} of {path.name}: {error}", param_hint="PROMPTS") from error
    return rows


def show_report(session: Session, report: SweepReport) -> None:
    """The report as a table, an adapter a row, the base last."""
    columns = [*report.adapters, *([report.base] if report.base else [])]
    session.show_rows(columns, HEADERS, report_row)


def report_row(column: ReportColumn) -> tuple[str, ...]:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    interval = f"{percent(column.low)} to {percent(column.high)}" if column.low is not None else "-"
    return (
        column.adapter or "(base)",
        f"{column.correct}/{column.scored}",
        percent(column.accuracy),
        interval,
        percent(column.base_accuracy),
        str(column.unsuccessful),
    )
