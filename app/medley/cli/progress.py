"""A live bar of long work: share done, rate, time left. On a terminal a bar, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from medley.cli.service import err
from medley.client import Batch, Result

LINE_S = 5.0  # seconds between plain lines
LOOK_S = 0.5  # seconds between two looks at a batch


class _Rate(TextColumn):
    def render(self, task: RichTask) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s", style="cyan")


@contextmanager
def bar(label: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of `total` are done; `done` were before the work began."""
    if not sys.stderr.isatty():
        yield _plain(label, total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(""),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda done: progress.update(task, completed=done)


def _plain(label: str, total: int, done_before: int) -> Callable[[int], None]:
    started = time.monotonic()
    shown_at = started
    is_whole = False

    def show(done: int) -> None:
        nonlocal shown_at, is_whole
        now = time.monotonic()
        if is_whole or (done < total and now - shown_at < LINE_S):
            return
        shown_at, is_whole = now, done >= total
        rate = (done - done_before) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        click.echo(f"{label}: {done}/{total} ({rate:,.0f}/s{left})", err=True)

    return show


def watch(label: str, batch: Batch) -> None:
    """Waits for the batch's end under a bar, without reading its results. `batch.status` is then its last."""
    counts = batch.status.counts
    with bar(label, counts.total, done=counts.ended) as show:
        while True:
            has_finished = batch.has_finished(wait=LOOK_S)
            show(batch.refresh().counts.ended)
            if has_finished:
                return


def follow(label: str, *batches: Batch) -> list[list[Result]]:
    """Waits for the batches together under one bar. Returns the results of each, in the order of their ends."""
    found: list[list[Result]] = [[] for _ in batches]
    after = [0] * len(batches)
    running = list(range(len(batches)))
    with bar(label, sum(b.status.counts.total for b in batches)) as show:
        while running:
            for i in tuple(running):
                page = batches[i].page(after=after[i], wait=1.0 / len(running))
                found[i] += page.results
                after[i] = page.next
                if page.finished:
                    running.remove(i)
                show(sum(map(len, found)))
    return found
