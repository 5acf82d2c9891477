"""Logs: one readable line an event, from structlog and from libraries alike, and never a tenant's text.

`configure` is called once, at a process's entry point. It knows nothing of what is logged; what must never be is
dropped by key, here, whoever wrote it.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

import msgspec
import structlog
from structlog.typing import Processor

from medley.config import Settings

Event = MutableMapping[str, Any]

# Keys whose values are a tenant's words or a secret. An event that has one has a bug; the value goes nowhere.
PRIVATE_KEYS = frozenset(
    {"prompt", "prompts", "prompt_token_ids", "text", "output", "outputs", "token_ids", "content", "body", "line"}
    | {"expected", "input", "inputs", "api_key", "key", "secret", "password", "authorization", "database_url"}
)
# Libraries that say much and little.
_QUIET = ("alembic", "celery", "kombu", "amqp", "httpx", "httpcore", "uvicorn.access", "uvicorn.error", "asyncio")


def configure(process: str, settings: Settings | None = None, *, format: str = "line", level: str = "info") -> None:
    """Send this process's logs to stdout, a line an event; libraries' warnings too.

    `process` is its name in the table of processes. `format` is "line" (time, process, event, key=value),
    "bare" (without the process, for a supervisor that adds it) or "json"; `settings` overrides both options.
    """
    if settings is not None:
        format, level = settings.log_format, settings.log_level
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        drop_private,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.ExceptionRenderer(_Traces(process).render),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=True,
    )
    render: Processor = _render_json if format == "json" else _LineRenderer(process if format == "line" else None)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _name_foreign],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _Named(process), render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_crash


def drop_private(_logger: Any, _method: str, event: Event) -> Event:
    """Replace what must not be logged with its size."""
    for key in PRIVATE_KEYS.intersection(event):
        value = event[key]
        event[key] = f"<{len(value)} dropped>" if hasattr(value, "__len__") else "<dropped>"
    return event


# What PostgreSQL refuses it quotes, whole row and all. In the API any message may quote what a tenant sent.
_QUOTING_PACKAGES = ("sqlalchemy", "psycopg")
_QUOTING_PROCESSES = frozenset({"api"})


class _Traces:
    """Tracebacks as text: where and of what type an exception is always, its message where that quotes no data."""

    def __init__(self, process: str) -> None:
        self._keeps_messages = process not in _QUOTING_PROCESSES

    def render(self, exc_info: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
        parts: list[str] = []
        error: BaseException | None = exc_info[1]
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            kind = type(error)
            quotes = not self._keeps_messages or kind.__module__.split(".")[0] in _QUOTING_PACKAGES
            message = "<message dropped>" if quotes else str(error)
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{frames}{kind.__qualname__}: {message}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\n\nwhich followed from:\n\n".join(parts)


def _log_crash(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Python's own would print the message, whatever it quotes."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, _trace)
        return
    structlog.get_logger().critical("process.crashed", exc_info=error)


def _name_foreign(_logger: Any, _method: str, event: Event) -> Event:
    """A library's line is free text: its logger's name becomes the event, the text a value."""
    record: logging.LogRecord = event["_record"]
    event["message"] = event.pop("event", "")
    event["event"] = record.name
    return event


class _Named:
    """Adds the process's name."""

    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(self, _logger: Any, _method: str, event: Event) -> Event:
        event["process"] = self._process
        return event


class _LineRenderer:
    """`12:30:01.250 worker warning lease.lost worker=worker_0192 num_jobs=3`; a traceback follows below."""

    def __init__(self, process: str | None) -> None:
        self._process = process

    def __call__(self, _logger: Any, _method: str, event: Event) -> str:
        event.pop("process", None)
        head = [str(event.pop("timestamp"))[11:23]]
        if self._process is not None:
            head.append(self._process)
        level = event.pop("level", "info")
        if level not in ("info", "debug"):
            head.append(level.upper())
        head.append(str(event.pop("event")))
        trace = event.pop("exception", None)
        pairs = [f"{key}={_shown(value)}" for key, value in event.items()]
        line = " ".join([*head, *pairs])
        return line if trace is None else f"{line}\n{trace}"


def _render_json(_logger: Any, _method: str, event: Event) -> str:
    return msgspec.json.encode(dict(event), enc_hook=str).decode()


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text
