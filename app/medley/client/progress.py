"""A live bar of long work: share done, rate, time left.

In a notebook and on a terminal it moves in its place; elsewhere it is a plain line now and then, on standard error.
"""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LINE_S = 5.0  # seconds between plain lines
REFRESH_S = 0.2  # seconds between two looks of a notebook's bar

Show = Callable[[int], None]


@contextmanager
def bar(label: str, total: int, *, done: int = 0) -> Iterator[Show]:
    """Yields a function that takes how many of `total` are done; `done` were before the work began."""
    display = _notebook_display()
    if display is not None:
        yield _in_notebook(display, _Work(label, total, done))
    elif sys.stderr.isatty():
        with _on_terminal(label, total, done) as show:
            yield show
    else:
        yield _in_lines(_Work(label, total, done))


class _Work:
    """How far the work is, as text and as a notebook shows it."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._label, self._done_before = label, done
        self._started = time.monotonic()

    def __repr__(self) -> str:
        rate = (self.done - self._done_before) / max(time.monotonic() - self._started, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        return f"{self._label}: {self.done}/{self.total} ({rate:,.0f}/s{left})"

    def _repr_html_(self) -> str:
        return f'<progress value="{self.done}" max="{max(1, self.total)}"></progress> {html.escape(repr(self))}'


def _in_lines(work: _Work) -> Show:
    shown_at = time.monotonic()
    is_whole = False

    def show(done: int) -> None:
        nonlocal shown_at, is_whole
        now = time.monotonic()
        if is_whole or (done < work.total and now - shown_at < LINE_S):
            return
        shown_at, is_whole, work.done = now, done >= work.total, done
        sys.stderr.write(f"{work!r}\n")

    return show


def _notebook_display() -> Any | None:
    """IPython's `display` where a notebook's kernel runs this: who does that has loaded it."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return importlib.import_module("IPython.display").display if hasattr(shell, "kernel") else None


def _in_notebook(display: Any, work: _Work) -> Show:
    handle = display(work, display_id=True)
    shown_at = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if done < work.total and now - shown_at < REFRESH_S:
            return
        shown_at, work.done = now, done
        handle.update(work)

    return show


@contextmanager
def _on_terminal(label: str, total: int, done: int) -> Iterator[Show]:
    from rich import progress  # slow to import, and needed by those who look at a terminal alone
    from rich.console import Console
    from rich.text import Text

    class Rate(progress.TextColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed or 0:,.0f}/s", style="cyan")

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Rate(""),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as live:
        task = live.add_task(label, total=total, completed=done)
        yield lambda done: live.update(task, completed=done)
