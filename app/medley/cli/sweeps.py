"""`medley sweep [run]|extend|diff`: prompts x adapters as one durable job, followed to its report, compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from medley.cli.service import MANY_RETRIES, Session, sampling_options, service_command
from medley.client.sweeps import Sweep
from medley.client.types import SweepReport
from medley.spec.paired import DiffColumn
from medley.spec.statistics import ReportColumn

HEADERS = ("adapter", "correct", "accuracy", "95 %", "base", "unsuccessful")
DIFF_HEADERS = (
    "adapter",
    "with",
    "prompts",
    "accuracy",
    "with",
    "difference",
    "95 %",
    "won",
    "lost",
    "tied",
    "p",
    "Holm",
)


class _RunsByDefault(click.Group):
    """What follows is the name of a sweep where it is no subcommand; `run` may be said, and must be for "diff"."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunsByDefault)
def sweep() -> None:
    """Run prompts over many adapters, with a report for each.

    `medley sweep NAME PROMPTS ...` is `medley sweep run NAME PROMPTS ...`.
    """


@sweep.command()
@click.argument("name")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--adapters", "patterns", multiple=True, help='Names and patterns, such as "acme/*"; may be repeated.')
@click.option("--include-base", is_flag=True, help="Run the base model as well.")
@click.option("--seeds", help="Seeds, separated by commas: every cell once with each.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the sweep to its end.")
@click.option("--report", "is_report", is_flag=True, help="Only print the report of what has ended.")
@sampling_options
@service_command
def run(session: Session, name: str, prompts: Path | None, patterns: Sequence[str], **options: Any) -> None:
    """Run PROMPTS over adapters as sweep NAME and print the report; the same again resumes it, and more extends it.

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
        _follow(session, handle, wait=options["wait"])


@sweep.command()
@click.argument("name")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--adapters", "patterns", multiple=True, help="Names and patterns to add; may be repeated.")
@click.option("--include-base", is_flag=True, help="Add the base model.")
@click.option("--seeds", help="Seeds to add, separated by commas.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the sweep to its end.")
@service_command
def extend(session: Session, name: str, prompts: Path | None, patterns: Sequence[str], **options: Any) -> None:
    """Add PROMPTS, adapters or seeds to sweep NAME: only what is missing runs."""
    seeds = _read_seeds(options["seeds"]) or []
    if prompts is None and not (patterns or seeds or options["include_base"]):
        raise click.UsageError("add what? give a file of PROMPTS, --adapters, --include-base or --seeds")
    with session.client(retries=MANY_RETRIES) as client:
        handle = client.get_sweep(name)
        handle.extend(
            [] if prompts is None else _read_prompts(prompts),
            adapters=patterns,
            include_base=options["include_base"],
            seeds=seeds,
        )
        _follow(session, handle, wait=options["wait"])


@sweep.command()
@click.argument("name")
@click.argument("other", required=False)
@click.option("--adapter", help="One column of NAME; all where none is given.")
@click.option("--with-adapter", help='The column it is compared with ("(base)" is the base).')
@click.option("--seed", type=click.IntRange(min=0), help="Of the bootstrap.")
@service_command
def diff(session: Session, name: str, other: str | None, **options: Any) -> None:
    """Compare sweep NAME with sweep OTHER, adapter by adapter, over the prompts that both have.

    Without OTHER, each adapter of NAME with its base. Shown are accuracies (a prompt counts once), their difference
    with a paired bootstrap's 95 % interval, prompts won, lost and tied, and McNemar's exact p, also after Holm.
    """
    with session.client() as client:
        found = client.get_sweep(name).diff(other, **options)
        session.show_rows(found.columns, DIFF_HEADERS, _diff_row)


def _diff_row(column: DiffColumn) -> tuple[str, ...]:
    def share(value: float | None, form: str = ".1%") -> str:
        return "-" if value is None else format(value, form)

    interval = "-" if column.low is None else f"{share(column.low, '+.1%')} to {share(column.high, '+.1%')}"
    return (
        column.adapter or "(base)",
        column.with_adapter or "(base)",
        str(column.prompts),
        share(column.accuracy),
        share(column.with_accuracy),
        share(column.difference, "+.1%"),
        interval,
        str(column.wins),
        str(column.losses),
        str(column.ties),
        share(column.p, ".3g"),
        share(column.p_adjusted, ".3g"),
    )


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


def _follow(session: Session, handle: Sweep, *, wait: bool) -> None:
    """Show the sweep's end and report, or with `wait` False how it stands."""
    if not wait:
        session.show(handle.status, handle.id)
        return
    handle.wait(progress=True)
    show_report(session, handle.report())


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
