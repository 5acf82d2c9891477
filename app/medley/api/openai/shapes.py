"""OpenAI's resources as JSON: files, batches, models, and the pages in which they are listed.

Knows rows and public ids; reads nothing itself. Times are seconds since 1970, as OpenAI has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from sqlalchemy import Row

from medley.spec.ids import BATCH, FILE, public_id


class File(msgspec.Struct, kw_only=True):
    """A file of the tenant's, stored whole."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class Deleted(msgspec.Struct):
    """It is gone."""

    id: str
    object: str
    deleted: bool = True


class BatchError(msgspec.Struct, omit_defaults=False):
    """One thing wrong with a batch's input; `line` counts from 1, null for the file as a whole."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(msgspec.Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class OpenAIBatch(msgspec.Struct, kw_only=True):
    """A file of requests on its way to files of answers."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class Model(msgspec.Struct, kw_only=True):
    """The base, or an adapter: `root` is what runs, `parent` the base that an adapter changes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None


class Page(msgspec.Struct):
    data: Sequence[Any]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"


def page_of(found: Sequence[File] | Sequence[OpenAIBatch], limit: int) -> Page:
    """A page of what was read with one more than `limit`."""
    shown = found[:limit]
    ends = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page(shown, len(found) > limit, *ends)


def file_of(row: Row[Any]) -> File:
    """From a row of `files.read_file`."""
    return File(
        id=public_id(FILE, row.id),
        bytes=row.size_bytes,
        created_at=int(row.created_at.timestamp()),
        expires_at=_seconds(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
    )


def batch_of(row: Row[Any], counted: tuple[int, int] | None) -> OpenAIBatch:
    """From a row of `openai_batches.read_openai_batch`.

    counted: (completed, failed) requests, where these are not the native batch's jobs.
    """
    status = status_of(row)
    ended = {state: _seconds(row.ended_at) if row.state == state else None for state in _ENDS}
    return OpenAIBatch(
        id=public_id(BATCH, row.id),
        endpoint=row.endpoint,
        model=row.model,
        errors=None if row.errors is None else BatchErrors(msgspec.convert(row.errors, list[BatchError])),
        input_file_id=public_id(FILE, row.input_file_id),
        completion_window=row.completion_window,
        status=status,
        output_file_id=_optional_file(row.output_file_id),
        error_file_id=_optional_file(row.error_file_id),
        created_at=int(row.created_at.timestamp()),
        in_progress_at=_seconds(row.in_progress_at),
        expires_at=_seconds(row.deadline_at),
        finalizing_at=_seconds(row.finalizing_at),
        completed_at=ended["completed"],
        failed_at=ended["failed"],
        expired_at=ended["expired"],
        cancelling_at=_seconds(row.cancel_requested_at),
        cancelled_at=ended["cancelled"],
        request_counts=_counts(row, counted),
        usage=_usage(row),
        metadata=row.metadata,
    )


_ENDS = ("completed", "failed", "expired", "cancelled")


def status_of(row: Row[Any]) -> str:
    """A batch's state as OpenAI names it."""
    if row.state in _ENDS:
        return str(row.state)
    return "cancelling" if row.cancel_requested_at is not None else str(row.state)


def _counts(row: Row[Any], counted: tuple[int, int] | None) -> RequestCounts:
    if row.num_completed is not None:
        return RequestCounts(row.num_requests, row.num_completed, row.num_failed)
    completed, failed = counted or (row.succeeded, row.failed + row.cancelled + row.expired)
    return RequestCounts(row.num_requests, completed, failed)


def _usage(row: Row[Any]) -> BatchUsage:
    """Counted with the files; before that the native batch's, in which each sample counts its prompt."""
    used, made = row.prompt_tokens, row.completion_tokens
    if row.input_tokens is not None:
        used, made = row.input_tokens, row.output_tokens
    return BatchUsage(used, made, used + made, {"cached_tokens": 0}, {"reasoning_tokens": 0})


def _optional_file(value: UUID | None) -> str | None:
    return None if value is None else public_id(FILE, value)


def _seconds(value: datetime | None) -> int | None:
    return None if value is None else int(value.timestamp())
