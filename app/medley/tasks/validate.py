"""The first steps of an OpenAI batch: its file is judged whole, then its lines become jobs, a chunk a transaction.

Judging writes nothing but its end, so one that is cut begins again. While lines become jobs, each transaction holds
the place in the file up to which they have, so one that is cut goes on there. An input that is lost meanwhile ends the
batch with the jobs that it has, once that is sure. Knows nothing of Celery.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import Connection, Engine, Row

from medley.api.adapter_refs import Resolved
from medley.api.batches import LINE_BYTES_A_PROMPT_BYTE, LINE_OVERHEAD_BYTES
from medley.api.bodies import whole_lines
from medley.api.errors import TooLarge
from medley.api.job_bodies import label_key
from medley.api.openai.lines import Line, LineReader, file_error, line_error
from medley.api.openai.models import resolve_models
from medley.api.openai.requests import Request, RequestReader, job_columns
from medley.api.openai.shapes import BatchError
from medley.config import Settings
from medley.db import openai_batches
from medley.db.batches import NewBatch
from medley.db.connections import tenant_transaction, transaction
from medley.db.ends import End, end_unclaimed
from medley.db.files import read_object_key
from medley.db.lanes import Lane
from medley.db.new_jobs import add_lane_demand, append_columns, lanes_of, read_last_job
from medley.db.quotas import QuotaExceeded, read_quotas, reserve
from medley.db.tenants import read_name
from medley.objects import ObjectMissing, Objects, StoreError
from medley.rings import Ringer, pool_channel
from medley.spec.jobs import JobState

LINES_A_CHUNK = 2_000  # judged between two looks at the batch's row
JOBS_A_CHUNK = 2_000  # written by one transaction, of some tens of milliseconds
CHUNK_S = openai_batches.TAKEN_S / 5  # a chat may render slowly, and the step must be kept
MAX_ERRORS = 10_000  # listed; beyond it they are counted
LOST_AFTER_S = 900.0  # for which an input must have been missing: a store that comes back may take a while to show it

log = structlog.get_logger()


@dataclass
class _Verdict:
    """What is known of a file so far."""

    num_requests: int = 0
    num_jobs: Counter[str] = field(default_factory=Counter)  # by model
    num_bytes: int = 0  # of prompts
    num_errors: int = 0
    is_too_many: bool = False
    errors: list[BatchError] = field(default_factory=list)
    custom_ids: set[str | bytes] = field(default_factory=set)  # as `label_key` has them
    models: dict[str, Resolved] = field(default_factory=dict)

    def add(self, *errors: BatchError) -> None:
        self.num_errors += len(errors)
        self.errors += errors[: MAX_ERRORS - len(self.errors)]

    def lanes(self, base_name: str) -> list[Lane]:
        """The jobs by what their models mean: two names of one revision are one lane."""
        lanes: dict[UUID | None, Lane] = {}
        for model, num_jobs in self.num_jobs.items():
            revision = self.models[model].revision
            name = None if model == base_name else model
            lane = lanes.get(revision, Lane(revision, name, 0))
            lanes[revision] = Lane(revision, lane.adapter, lane.num_jobs + num_jobs)
        return list(lanes.values())

    def listed(self) -> list[BatchError]:
        left = self.num_errors - len(self.errors)
        return self.errors + [file_error("more_errors", f"{left} more errors are not listed")] * (left > 0)


class Validator:
    """on_chunk: called after each chunk. should_stop: asked between chunks; what is left is done later."""

    def __init__(
        self,
        engine: Engine,
        objects: Objects,
        ringer: Ringer,
        requests: RequestReader,
        settings: Settings,
        *,
        on_chunk: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._objects = objects
        self._ringer = ringer
        self._reader = LineReader(requests)
        self._limits, self._quotas = settings.limits, settings.quotas
        self._base_name = settings.base_name
        self._on_chunk = on_chunk
        self._should_stop = should_stop
        self._max_line_bytes = LINE_BYTES_A_PROMPT_BYTE * self._limits.max_prompt_bytes + LINE_OVERHEAD_BYTES

    def validate(self, row: Row[Any]) -> None:
        """Judges the file of a batch whose step was taken: it fails with every error, or its jobs are due."""
        verdict = _Verdict()
        is_kept = self._judge(row, verdict)
        if is_kept is None:
            return
        try:
            with transaction(self._engine) as conn:
                self._conclude(conn, row, verdict, is_kept=is_kept)
        except QuotaExceeded as error:
            found = file_error("quota_exceeded", f"the tenant's limit {error}; nothing was done, create it again later")
            with transaction(self._engine) as conn:
                _fail(conn, row.id, [found], num_errors=1)
        self._ringer.ring_done(row.id)

    def _conclude(self, conn: Connection, row: Row[Any], verdict: _Verdict, *, is_kept: bool) -> None:
        """Raises QuotaExceeded; then nothing of the transaction may stand."""
        if not is_kept or not openai_batches.renew_step(conn, row.id, "validating"):
            if openai_batches.end_without_jobs(conn, row.id, "cancelled"):
                log.info("openai_batch.cancelled", batch=row.id.hex)
        elif verdict.num_errors:
            _fail(conn, row.id, verdict.listed(), num_errors=verdict.num_errors)
        elif openai_batches.begin_jobs(
            conn,
            row.id,
            num_requests=verdict.num_requests,
            models={model: resolved.revision for model, resolved in verdict.models.items()},
            lanes=verdict.lanes(self._base_name),
        ):
            quotas = read_quotas(conn, row.tenant_id, self._quotas)
            num_jobs = verdict.num_jobs.total()
            reserve(conn, row.tenant_id, quotas, row.id, num_jobs=num_jobs, num_bytes=verdict.num_bytes)
            log.info("openai_batch.valid", batch=row.id.hex, num_requests=verdict.num_requests)

    def _judge(self, row: Row[Any], verdict: _Verdict) -> bool | None:
        """Fills `verdict`. False: the batch is cancelled. None: this process stops, or another took the batch."""
        try:
            for chunk in _in_chunks(self._lines(row, 0), LINES_A_CHUNK, lambda _: 1):
                self._judge_chunk(row.tenant_id, [line for line, _ in chunk], verdict)
                with transaction(self._engine) as conn:
                    if not openai_batches.renew_step(conn, row.id, "validating"):
                        current = openai_batches.read_openai_batch(conn, row.id)
                        return False if current is not None and current.state == "validating" else None
                self._on_chunk()
                if self._should_stop():
                    with transaction(self._engine) as conn:
                        openai_batches.leave_step(conn, row.id)
                    return None
        except ObjectMissing:
            verdict.add(file_error("file_not_found", "the input file is not in the store any more; upload it again"))
        except TooLarge as error:  # a line without end
            fault = error.faults[0]
            verdict.add(BatchError("line_too_long", fault.line, str(fault), None))
        if verdict.num_requests == 0 and not verdict.num_errors:
            verdict.add(file_error("empty_file", "the input file has no line; one request a line is wanted"))
        return True

    def _judge_chunk(self, tenant: UUID, lines: list[Line], verdict: _Verdict) -> None:
        unknown = {line.request.model for line in lines if line.request} - verdict.models.keys()
        if unknown:
            with tenant_transaction(self._engine, tenant) as conn:
                verdict.models |= resolve_models(conn, read_name(conn, tenant), self._base_name, unknown)
        for line in lines:
            verdict.num_requests += 1
            verdict.add(*line.errors)
            label = None if line.custom_id is None else label_key(line.custom_id)
            if label is not None and label in verdict.custom_ids:
                got, wanted = f"{line.custom_id!r} again"[:80], "a custom_id once in a file"
                verdict.add(line_error("duplicate_custom_id", line.number, param="custom_id", got=got, wanted=wanted))
            elif label is not None:
                verdict.custom_ids.add(label)
            if line.request is None:
                continue
            verdict.num_jobs[line.request.model] += line.request.num_jobs
            verdict.num_bytes += line.request.num_bytes
            if (reason := verdict.models[line.request.model].wanted) is not None:
                got, wanted = repr(line.request.model)[:80], f"{self._base_name!r}, or {reason}"
                verdict.add(line_error("model_not_found", line.number, param="body.model", got=got, wanted=wanted))
        limit = self._limits.max_jobs_per_request
        if verdict.num_jobs.total() > limit and not verdict.is_too_many:
            verdict.is_too_many = True
            verdict.add(file_error("too_many_requests", f"more than {limit} samples, which is the limit of one file"))

    def expand(self, row: Row[Any]) -> None:
        """Makes jobs of the lines from where they stand, until all are or this stops. Raises StoreError, OSError.

        Those of a cancelled batch end at once. An input that is lost ends the expansion in its time.
        """
        try:
            self._expand(row)
        except ObjectMissing:
            if not self._give_up(row, is_missing=True):
                raise
        except (StoreError, OSError):
            if not self._give_up(row, is_missing=False):
                raise

    def _expand(self, row: Row[Any]) -> None:
        with transaction(self._engine) as conn:
            models = {m.model: m.revision_id for m in openai_batches.read_models(conn, row.id)}
        at = row.next_offset
        for chunk in _in_chunks(self._lines(row, at), JOBS_A_CHUNK, _num_jobs):
            requests = [(line.request, line.custom_id, models[line.request.model]) for line, _ in chunk if line.request]
            if not self._expand_chunk(row.id, requests, at, chunk[-1][1]):
                return
            at = chunk[-1][1]
            self._ringer.ring(pool_channel(row.pool))
            self._on_chunk()
            if self._should_stop():
                with transaction(self._engine) as conn:
                    openai_batches.leave_step(conn, row.id)
                return
        with transaction(self._engine) as conn:
            current = openai_batches.lock_expansion(conn, row.id)
            if current is not None and current.next_offset == at:
                openai_batches.advance(conn, row.id, None)
        log.info("openai_batch.expanded", batch=row.id.hex)

    def _expand_chunk(
        self, batch: UUID, requests: list[tuple[Request, str | None, UUID | None]], at: int, end: int
    ) -> bool:
        """Whether the chunk that stands from `at` to `end` was this one's to write."""
        with transaction(self._engine) as conn:
            row = openai_batches.lock_expansion(conn, batch)
            if row is None or row.next_offset != at:
                return False
            self._write(conn, row, requests)
            openai_batches.advance(conn, batch, end)
        return True

    def _write(self, conn: Connection, row: Row[Any], requests: list[tuple[Request, str | None, UUID | None]]) -> None:
        """Makes the jobs; those of a cancelled batch, and of an adapter that was barred meanwhile, end at once."""
        models = openai_batches.read_models(conn, row.id)
        batch = NewBatch(row.id, row.tenant_id, row.pool, priority=row.priority, deadline_at=row.deadline_at)
        columns = job_columns(requests, self._base_name)
        is_held = row.paused_at is not None
        ids = append_columns(conn, batch, columns, is_held=is_held, after=read_last_job(conn, row.id))
        if not is_held:
            add_lane_demand(conn, batch, lanes_of(columns))
        if row.cancel_requested_at is not None:
            end_unclaimed(conn, ids, End(JobState.CANCELLED))
            return
        made = list(zip(ids, columns.revisions, strict=True))
        for end, barred in (
            (End.quarantined(), {m.revision_id for m in models if m.is_quarantined}),
            (End.revoked(), {m.revision_id for m in models if m.is_revoked}),
        ):
            end_unclaimed(conn, [job for job, revision in made if revision in barred], end)

    def _give_up(self, row: Row[Any], *, is_missing: bool) -> bool:
        """Ends the expansion where its input will not be read any more: with what there is, failed for the rest."""
        with transaction(self._engine) as conn:
            lost = openai_batches.note_lost_input(conn, row.id, is_missing=is_missing)
            is_over = lost.is_late or lost.cancel_requested_at is not None or lost.lost_s >= LOST_AFTER_S
            if not is_over:
                return False
            if openai_batches.lock_expansion(conn, row.id) is not None:
                why = "is not in the store any more" if is_missing else "could not be read while the window was open"
                message = f"the input file {why}; of its requests those that are in neither file were never made"
                code = "file_not_found" if is_missing else "file_unreadable"
                openai_batches.stop_expansion(conn, row.id, _encoded([file_error(code, message)]))
        log.warning("openai_batch.input_lost", batch=row.id.hex, is_missing=is_missing)
        self._ringer.ring_done(row.id)
        return True

    def _lines(self, row: Row[Any], start: int) -> Iterator[tuple[Line, int]]:
        """(line, where the next begins) from byte `start` on; blank ones are passed over. Raises ObjectMissing."""
        with transaction(self._engine) as conn:
            key = read_object_key(conn, row.input_file_id)
        if key is None:
            raise ObjectMissing(row.input_file_id.hex)
        with self._objects.open_read(key, start=start) as source:
            at = start
            for lines, first in whole_lines(source, self._max_line_bytes):
                for number, data in enumerate(lines.removesuffix(b"\n").split(b"\n"), first):
                    at += len(data) + 1
                    if data.strip():
                        yield self._reader.read(data, number, row.endpoint), at


def _fail(conn: Connection, batch: UUID, errors: list[BatchError], *, num_errors: int) -> None:
    if openai_batches.end_without_jobs(conn, batch, "failed", errors=_encoded(errors)):
        log.info("openai_batch.failed", batch=batch.hex, num_errors=num_errors)


def _encoded(errors: list[BatchError]) -> str:
    return msgspec.json.encode(errors).decode()


def _num_jobs(line: Line) -> int:
    return line.request.num_jobs if line.request else 0


def _in_chunks(
    lines: Iterator[tuple[Line, int]], size: int, weigh: Callable[[Line], int]
) -> Iterator[list[tuple[Line, int]]]:
    """Lines in lists that reach `size`, as `weigh` counts them, or take `CHUNK_S` to read."""
    chunk: list[tuple[Line, int]] = []
    weight, began = 0, time.monotonic()
    for line, end in lines:
        chunk.append((line, end))
        weight += weigh(line)
        if weight >= size or time.monotonic() - began > CHUNK_S:
            yield chunk
            chunk, weight, began = [], 0, time.monotonic()
    if chunk:
        yield chunk
