"""`medley submit`, `status`, `results`, `cancel`: jobs and batches from a terminal."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from medley.cli.service import MANY_RETRIES, Session, sampling_options, service_command
from medley.client import JobEnded, Result
from medley.client.downloads import require_suffix
from medley.client.types import BatchAdapter, BatchStatus

ADAPTER_HEADERS = ("adapter", "done", "succeeded", "failures", "tokens", "jobs/s", "expected")


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "path", type=click.Path(exists=True, dir_okay=False), help="A JSONL file, a job a line.")
@click.option("--adapter", help="The adapter's name; the base model where none is given.")
@click.option("--continuation", help="A text to be scored after PROMPT; nothing is generated.")
@click.option("--name", help="A label for the batch.")
@click.option("--priority", type=click.Choice(["low", "normal", "high"]))
@click.option("--wait/--no-wait", default=None, help="Wait for the result (default for a single prompt).")
@sampling_options
@service_command
def submit(session: Session, prompt: str | None, path: str | None, sampling: dict[str, Any], **options: Any) -> None:
    """Submit a PROMPT, or a file of jobs, and print the result or the batch's id."""
    wait = options.pop("wait")
    if (prompt is None) == (path is None):
        raise click.UsageError("give either a PROMPT or --file")
    if prompt is not None and options["name"] is not None:
        raise click.UsageError("--name labels a batch; a single prompt has none")
    if path is not None and options.pop("continuation") is not None:
        raise click.UsageError("--continuation is of a single prompt; a line of a file has its own")
    with session.client(retries=MANY_RETRIES) as client:
        if path is not None:
            batch = client.submit_file(path, **options, **sampling)
            if wait:
                batch.wait(progress=True)
            session.show(batch.status, describe(batch.status) if wait else batch.id)
            return
        del options["name"]
        assert prompt is not None
        job = client.submit(prompt, **options, **sampling)
        if wait is False:
            session.show(job.status, job.id)
            return
        try:
            completion = job.result()
        except JobEnded as error:
            if session.as_json:
                session.show(error.status, "")
            raise
        score = completion.score
        session.show(job.status, completion.text if score is None else f"{score.logprob:.6f}\t{score.is_greedy}")


@click.command()
@click.argument("target", required=False)
@click.option("--adapters", "by_adapter", is_flag=True, help="Of a batch or a sweep, adapter by adapter.")
@service_command
def status(session: Session, target: str | None, by_adapter: bool) -> None:
    """Show how a job, a batch or a sweep stands; without TARGET, the newest batches."""
    if by_adapter and (target is None or target.startswith("job_")):
        raise click.UsageError("--adapters is of one batch or sweep: give its id or name")
    with session.client() as client:
        if target is not None and by_adapter:
            session.show_rows(client.find(target).adapters(), ADAPTER_HEADERS, _adapter_row)
        elif target is None:
            headers = ("id", "name", "state", "done", "total", "failed", "created")
            session.show_rows(client.batches(), headers, _batch_row)
        elif target.startswith("job_"):
            job = client.job(target).status
            session.show(job, f"{job.id}\t{job.state}" + (f"\t{job.error.code}" if job.error else ""))
        else:
            batch = client.find(target).status
            session.show(batch, describe(batch))


@click.command()
@click.argument("batch_id")
@click.option("--after", default=0, show_default=True, help="Go on after this result number (seq).")
@click.option("--follow/--no-follow", "is_followed", default=True, help="Wait for what has not ended yet.")
@click.option("--latest", is_flag=True, help="Leave out results that a retry has superseded.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write .jsonl or .parquet here; again, it goes on where it was cut off.",
)
@service_command
def results(session: Session, batch_id: str, after: int, is_followed: bool, latest: bool, output: Path | None) -> None:
    """Print the results of a batch or a sweep as they finish, each once: seq, custom_id, adapter, state, text."""
    try:
        if output is not None:
            require_suffix(output)
        with session.client(retries=MANY_RETRIES) as client:
            batch = client.find(batch_id)
            if output is None:
                session.show_lines(batch.results(after=after, follow=is_followed, latest=latest), _result_row)
                return
            progress = sys.stderr.isatty()
            count = batch.download(output, after=after, follow=is_followed, latest=latest, progress=progress)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--output") from error
    session.show({"path": str(output), "results": count}, f"{count} results in {output}")


@click.command()
@click.argument("target")
@service_command
def cancel(session: Session, target: str) -> None:
    """Cancel a job, a batch or a sweep; what has finished is kept."""
    with session.client() as client:
        status = client.cancel(target)
        session.show(status, f"{status.id}\t{status.state}")


def describe(batch: BatchStatus) -> str:
    c = batch.counts
    return (
        f"{batch.id}\t{batch.state}\t{c.ended}/{c.total} ended: {c.succeeded} succeeded, {c.failed} failed,"
        f" {c.cancelled} cancelled, {c.expired} expired;"
        f" {batch.usage.prompt_tokens} + {batch.usage.completion_tokens} tokens"
        + (f"; {c.retried} retried" if c.retried else "")
        + _pace(batch)
    )


def _pace(batch: BatchStatus) -> str:
    """How fast it goes and when it will be done, where that can be said."""
    said = "" if batch.rate is None else f"; {batch.rate:,.1f}/s"
    return said + ("" if batch.expected_at is None else f"; expected at {shown_time(batch.expected_at)}")


def shown_time(at: datetime | None) -> str:
    """A time to the second, or a dash."""
    return "-" if at is None else at.isoformat(timespec="seconds")


def _adapter_row(row: BatchAdapter) -> tuple[str, ...]:
    c = row.counts
    failures = ", ".join(f"{code}: {num}" for code, num in row.failures.items())
    rate = "-" if row.rate is None else f"{row.rate:,.1f}"
    tokens = f"{row.usage.prompt_tokens} + {row.usage.completion_tokens}"
    counts = (f"{c.ended}/{c.total}", str(c.succeeded), failures or "-")
    return row.adapter or "(base)", *counts, tokens, rate, shown_time(row.expected_at)


def _batch_row(batch: BatchStatus) -> tuple[str, ...]:
    c = batch.counts
    name = batch.sweep.name if batch.sweep else batch.name or ""
    return batch.id, name, batch.state, str(c.ended), str(c.total), str(c.failed), shown_time(batch.created_at)


def _result_row(result: Result) -> tuple[str, ...]:
    text = result.text if result.error is None else f"{result.error.code}: {result.error.message}"
    return str(result.seq), result.custom_id or "", result.adapter or "(base)", result.state, text or ""
