"""The last step of an OpenAI batch: its output and error file, written from the results at constant memory.

The batch is at its end only once its files are durable. A task that is cut leaves rows of files that nobody sees,
which maintenance clears away; another writes new ones. So does the end of a retry: a file that was shown never changes.
Knows nothing of Celery.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self, cast
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import Connection, Engine, Row

from medley.api.openai.choices import (
    ChatCompletion,
    TextCompletion,
    completion_of,
    failure_of,
    group_by_request,
    usage_before,
    usage_of,
)
from medley.api.openai.errors import OpenAIError
from medley.api.openai.tokens import TokenTexts
from medley.db import openai_batches
from medley.db.connections import transaction
from medley.db.files import BATCH_OUTPUT, DEFAULT_EXPIRES_S, NewFile, begin_file, finish_file, give_up_files
from medley.db.results import read_answers
from medley.objects import Objects
from medley.rings import Ringer
from medley.spec.ids import BATCH, public_id, uuid7
from medley.spec.jobs import JobState

RESULTS_A_PAGE = 500  # read by one query

log = structlog.get_logger()


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: TextCompletion | ChatCompletion | dict[str, OpenAIError]


class _LineError(msgspec.Struct):
    code: str
    message: str


class _OutputLine(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _LineError | None


_UNFINISHED = {
    JobState.EXPIRED: _LineError("batch_expired", "the request was not done before the batch's window closed"),
    JobState.CANCELLED: _LineError("batch_cancelled", "the request was not done before the batch was cancelled"),
}


class _StepLost(Exception):
    """The batch is not being finalized any more."""


@dataclass
class _Counts:
    num_completed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Finalizer:
    """on_chunk: called after each page. should_stop: asked between pages; the files are written later."""

    def __init__(
        self,
        engine: Engine,
        objects: Objects,
        ringer: Ringer,
        texts: TokenTexts,
        base_name: str,
        *,
        on_chunk: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._objects = objects
        self._ringer = ringer
        self._texts = texts
        self._base_name = base_name
        self._on_chunk = on_chunk
        self._should_stop = should_stop

    def finalize(self, row: Row[Any]) -> None:
        """Writes the files of a batch whose step was taken, and ends it; leaves one of which jobs are retried."""
        counts = _Counts()
        with _Draft() as output, _Draft() as errors:
            try:
                for group in self._requests(row):
                    line = self._line(row.endpoint, group, counts)
                    (output if line.response is not None and line.response.status_code == 200 else errors).write(line)
                if self._should_stop():
                    with transaction(self._engine) as conn:
                        openai_batches.leave_step(conn, row.id)
                    return
                files = [self._store(row, "output", output), self._store(row, "errors", errors)]
            except _StepLost:
                return
        self._end(row, counts, files)

    def _end(self, row: Row[Any], counts: _Counts, files: list[UUID | None]) -> None:
        output, errors = files
        outcome = openai_batches.Outcome(
            num_completed=counts.num_completed,
            # Those that never became jobs among them.
            num_failed=row.num_requests - counts.num_completed,
            input_tokens=counts.input_tokens,
            output_tokens=counts.output_tokens,
            output_file=output,
            error_file=errors,
        )
        stored = [file for file in files if file is not None]
        with transaction(self._engine) as conn:
            state = openai_batches.end_finalized(conn, row.id, outcome, began_at=row.finalizing_at)
            if state is None:  # another task was first, or jobs are retried
                give_up_files(conn, stored)
                return
            for file in stored:
                finish_file(conn, file)
        log.info("openai_batch.ended", batch=row.id.hex, state=state)
        self._ringer.ring_done(row.id)

    def _requests(self, row: Row[Any]) -> Iterator[list[Row[Any]]]:
        """The results of each request, in the order of the input; ends early where this process stops."""
        after: UUID | None = None
        rest: list[Row[Any]] = []
        while not self._should_stop():
            with transaction(self._engine) as conn:
                _renew(conn, row)
                page = read_answers(conn, row.id, after=after, limit=RESULTS_A_PAGE)
            if not page:
                yield from group_by_request(rest)
                return
            after = page[-1].id
            *whole, rest = group_by_request([*rest, *page])
            yield from whole
            self._on_chunk()

    def _line(self, endpoint: str, group: list[Row[Any]], counts: _Counts) -> _OutputLine:
        first = group[0]
        usage, earlier = usage_of(group), usage_before(group)
        counts.input_tokens += usage.prompt_tokens + earlier.prompt_tokens
        counts.output_tokens += usage.completion_tokens + earlier.completion_tokens
        bad = next((row for row in group if row.state != JobState.SUCCEEDED), None)
        line = _OutputLine(f"batch_req_{first.id.hex}", first.custom_id, None, None)
        if bad is None:
            counts.num_completed += 1
            body = completion_of(endpoint, group, self._base_name, self._texts)
            line.response = _Response(200, first.id.hex, body)
            return line
        if bad.state == JobState.FAILED:
            status, error = failure_of(bad)
            line.response = _Response(status, first.id.hex, {"error": error})
        else:
            line.error = _UNFINISHED[JobState(bad.state)]
        return line

    def _store(self, row: Row[Any], kind: str, draft: _Draft) -> UUID | None:
        """The file of a draft in the store, which nobody sees yet; None for an empty one."""
        if draft.num_bytes == 0:
            return None
        file = NewFile(
            id=uuid7(),
            tenant=row.tenant_id,
            purpose=BATCH_OUTPUT,
            filename=f"{public_id(BATCH, row.id)}_{kind}.jsonl",
            size_bytes=draft.num_bytes,
            sha256=draft.sha256(),
            expires_after_s=row.output_expires_after_s or DEFAULT_EXPIRES_S,
        )
        with transaction(self._engine) as conn:
            begin_file(conn, file)
            _renew(conn, row)
        self._objects.put(file.object_key, draft.rewound())
        return file.id


def _renew(conn: Connection, row: Row[Any]) -> None:
    """Raises _StepLost."""
    if not openai_batches.renew_step(conn, row.id, "finalizing", began_at=row.finalizing_at):
        raise _StepLost


class _Draft:
    """A file on its way: on disk, hashed as it is written. Gone at the end of its block."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        self._encoder = msgspec.json.Encoder()
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: _OutputLine) -> None:
        data = self._encoder.encode(line) + b"\n"
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def rewound(self) -> BinaryIO:
        self._file.seek(0)
        return self._file

    def sha256(self) -> bytes:
        return self._hash.digest()
