"""How a command reaches the service, and how it shows what it got: shared by every command of a tenant.

A terminal gets tables and bars (rich), a pipe plain lines, and `--json` one JSON value a line everywhere. Results go
to standard output, progress and errors to standard error. Exit 0: done; 1: refused, unreachable or ended without a
result; 2: the command line was wrong.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medley.client import APIError, Client, MedleyError

F = TypeVar("F", bound=Callable[..., Any])

out = Console()
err = Console(stderr=True)

# A command that asks once says soon that nothing is there; one that follows long work outlives a restart.
FEW_RETRIES, MANY_RETRIES = 2, 8
# What a model wrote must not steer a terminal, nor break a line in two.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
_TEXT_ESCAPES = {code: shown for code, shown in _ESCAPES.items() if chr(code) not in "\n\t"}


class Session:
    """What the common options of a command amount to."""

    def __init__(self, url: str, api_key: str | None, as_json: bool) -> None:
        self.as_json = as_json
        self._url = url
        self._api_key = api_key

    def client(self, *, retries: int = FEW_RETRIES) -> Client:
        if not self._api_key:
            raise click.UsageError(
                "no API key: give --api-key or set MEDLEY_API_KEY (`medley tenants add NAME` makes one)"
            )
        try:
            return Client(self._url, self._api_key, retries=retries)
        except ValueError as error:
            raise click.UsageError(str(error)) from error

    def show(self, value: object, text: str) -> None:
        """One value: as JSON, or as `text`."""
        if self.as_json:
            _echo_json(value)
        else:
            click.echo(text.translate(_TEXT_ESCAPES) if sys.stdout.isatty() else text)

    def show_lines(self, values: Iterable[object], row: Callable[[Any], Sequence[str]]) -> None:
        """Many values, each as it comes: a JSON line, or tab-separated cells."""
        for value in values:
            if self.as_json:
                _echo_json(value)
            else:
                click.echo("\t".join(cell.translate(_ESCAPES) for cell in row(value)))

    def show_rows(self, values: Iterable[object], headers: Sequence[str], row: Callable[[Any], Sequence[str]]) -> None:
        """Many values: a JSON line each, a table on a terminal, tab-separated lines in a pipe."""
        if sys.stdout.isatty() and not self.as_json:
            table = Table(*headers, box=None, header_style="bold")
            for value in values:
                table.add_row(*(Text(cell.translate(_ESCAPES)) for cell in row(value)))
            out.print(table)
            return
        if not self.as_json:
            click.echo("\t".join(headers))
        self.show_lines(values, row)

    def fail(self, error: MedleyError | OSError | str) -> None:
        """Says on standard error what went wrong; the command goes on."""
        if not self.as_json:
            click.echo(f"error: {error}", err=True)
            return
        body: dict[str, object] = {"message": str(error)}
        if isinstance(error, APIError):
            body = {"message": error.message, "code": error.code, "faults": error.faults}
        click.echo(msgspec.json.encode({"error": body}), err=True)


def _echo_json(value: object) -> None:
    click.echo(msgspec.json.encode(value))


def service_command(command: F) -> F:
    """Adds --url, --api-key and --json, passes a `Session`, and turns the client's errors into one line and exit 1."""

    @click.option("--url", envvar="MEDLEY_URL", default="http://127.0.0.1:8700", show_default=True, help="The service.")
    @click.option("--api-key", envvar="MEDLEY_API_KEY", help="A tenant's key (or MEDLEY_API_KEY).")
    @click.option("--json", "as_json", is_flag=True, help="JSON, one value a line.")
    @functools.wraps(command)
    def wrapped(url: str, api_key: str | None, as_json: bool, **options: Any) -> Any:
        session = Session(url, api_key, as_json)
        try:
            return command(session, **options)
        except BrokenPipeError:
            # The reader has gone, as `head` does. What Python flushes at its end must go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except (MedleyError, OSError) as error:
            session.fail(error)
            raise SystemExit(1) from None

    return wrapped  # type: ignore[return-value]


_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("--max-tokens", int, "Tokens to generate at the most."),
    ("--min-tokens", int, "Tokens before an end is heeded."),
    ("--temperature", float, "0 takes the most likely token."),
    ("--top-k", int, "Draw from the k most likely."),
    ("--top-p", float, "Draw from the smallest set of this mass."),
    ("--min-p", float, "Draw from tokens of at least this share of the likeliest."),
    ("--repetition-penalty", float, "Over 1 discourages tokens seen before."),
    ("--presence-penalty", float, "Taken once from tokens of the output."),
    ("--frequency-penalty", float, "Taken for each time a token is in the output."),
    ("--seed", int, "Makes drawn tokens repeatable."),
    ("--top-logprobs", int, "Alternatives beside each token, with their log-probabilities."),
    ("--prompt-logprobs", int, "The prompt's log-probabilities, with so many alternatives."),
    ("--regex", str, "What the whole answer must match."),
)


def sampling_options(command: F) -> F:
    """Adds the sampling fields as options, passed on as one dict `sampling` of those given."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        names = [flag.removeprefix("--").replace("-", "_") for flag, _, _ in _SAMPLING]
        sampling = {name: options.pop(name) for name in names if options.get(name) is not None}
        for name in names:
            options.pop(name, None)
        if stop := options.pop("stop"):
            sampling["stop"] = list(stop)
        if choice := options.pop("choice"):
            sampling["choice"] = list(choice)
        if (schema := options.pop("json_schema")) is not None:
            sampling["json_schema"] = schema.read()
        if options.pop("ignore_eos"):
            sampling["ignore_eos"] = True
        return command(*args, sampling=sampling, **options)

    decorated: Any = wrapped
    decorated = click.option("--ignore-eos", is_flag=True, help="Go on past the model's end.")(decorated)
    decorated = click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated.")(decorated)
    decorated = click.option("--choice", multiple=True, help="A text the answer may be; repeated.")(decorated)
    schema = click.File(encoding="utf-8")
    decorated = click.option("--json-schema", type=schema, help="A JSON schema's file: the answer obeys it.")(decorated)
    for flag, kind, help_text in reversed(_SAMPLING):
        decorated = click.option(flag, type=kind, help=help_text)(decorated)
    return decorated  # type: ignore[no-any-return]
