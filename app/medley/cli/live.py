"""A view that is shown once, or again and again: in place on a terminal, one after another in a pipe.

It knows no database: a view is what a function returns, and a look that fails is said and tried again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event
from types import FrameType

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

# Names of hosts and adapters must not steer a terminal, nor break a line in two.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}


@dataclass(frozen=True)
class Part:
    """A line of summary and rows under headers. numbers: which columns are set to the right."""

    summary: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class View:
    """parts: for people; values: for scripts, a JSON line each."""

    parts: Sequence[Part]
    values: Sequence[object]


def show(look: Callable[[], View], *, as_json: bool) -> None:
    """One look. Raises what it raises."""
    view = look()
    if as_json:
        _echo_json(view)
    elif sys.stdout.isatty():
        Console().print(_drawn(view))
    else:
        click.echo(_plain(view))


def watch(look: Callable[[], View], *, as_json: bool, every_s: float) -> None:
    """A look each `every_s` seconds until Ctrl-C."""
    with suppress(KeyboardInterrupt), _interrupt() as interrupt:
        if sys.stdout.isatty() and not as_json:
            _watch_terminal(look, interrupt, every_s)
        else:
            _watch_pipe(look, as_json, interrupt, every_s)


@contextmanager
def _interrupt() -> Iterator[Event]:
    """What Ctrl-C sets, so that no library loses it in the middle of a look. A second one raises KeyboardInterrupt."""
    interrupt = Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _watch_terminal(look: Callable[[], View], interrupt: Event, every_s: float) -> None:
    console, drawn = Console(), Group()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not interrupt.is_set():
                try:
                    drawn = _drawn(look())
                except DBAPIError as error:
                    drawn = Group(Text(_away(error), style="red"))
                live.update(drawn, refresh=True)
                interrupt.wait(every_s)
    finally:
        console.print(drawn)  # what was last seen stays


def _watch_pipe(look: Callable[[], View], as_json: bool, interrupt: Event, every_s: float) -> None:
    while not interrupt.is_set():
        try:
            view = look()
        except DBAPIError as error:
            click.echo(_away(error), err=True)
        else:
            if as_json:
                _echo_json(view)
            else:
                click.echo(_plain(view) + "\n")
        sys.stdout.flush()
        interrupt.wait(every_s)


def _away(error: DBAPIError) -> str:
    return f"the database does not answer ({type(error.orig).__name__}); looking again"


def _echo_json(view: View) -> None:
    for value in view.values:
        click.echo(msgspec.json.encode(value))


def _plain(view: View) -> str:
    lines: list[str] = []
    for part in view.parts:
        lines.append(f"# {part.summary}")
        lines += ["\t".join(cell.translate(_ESCAPES) for cell in cells) for cells in (part.headers, *part.rows)]
    return "\n".join(lines)


def _drawn(view: View) -> Group:
    drawn: list[Text | Table] = []
    for part in view.parts:
        drawn.append(Text(part.summary.translate(_ESCAPES), style="bold"))
        if part.rows:
            table = Table(box=None, header_style="dim", padding=(0, 1))
            for number, header in enumerate(part.headers):
                is_number = number in part.numbers
                table.add_column(header, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis")
            for row in part.rows:
                table.add_row(*(Text(cell.translate(_ESCAPES)) for cell in row))
            drawn.append(table)
    return Group(*drawn)
