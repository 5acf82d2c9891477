"""The JSON that resources have: one struct a kind, and the rows they are made from.

Knows rows and public ids; reads nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from fastapi import Response
from sqlalchemy import Row

from medley.db.batches import PRIORITIES
from medley.spec.errors import RETRYABLE
from medley.spec.ids import BATCH, JOB, REVISION, SWEEP, public_id

NDJSON = "application/x-ndjson"
PRIORITY_NAMES = {number: name for name, number in PRIORITIES.items()}
_encoder = msgspec.json.Encoder()


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class JobFailure(msgspec.Struct):
    code: str
    message: str
    retryable: bool


class JobResult(msgspec.Struct):
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    usage: Usage


class Job(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["job"] = "job"
    batch_id: str
    state: str
    custom_id: str | None
    adapter: str | None
    revision: str | None
    attempt: int
    created_at: datetime
    finished_at: datetime | None
    seq: int | None
    retry_of: str | None
    result: JobResult | None
    error: JobFailure | None


class Counts(msgspec.Struct):
    total: int
    queued_or_running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int


class SweepShape(msgspec.Struct):
    name: str
    num_prompts: int
    num_columns: int
    num_expanded: int


class Batch(msgspec.Struct, kw_only=True):
    id: str
    object: str
    name: str | None
    state: str
    priority: str
    deadline_at: datetime | None
    created_at: datetime
    finished_at: datetime | None
    counts: Counts
    usage: Usage
    last_seq: int
    sweep: SweepShape | None
    job_ids: list[str] | msgspec.UnsetType = msgspec.UNSET


class Column(msgspec.Struct):
    adapter: str | None
    revision: str | None


class Sweep(Batch, kw_only=True):
    """A batch that the service expands; `columns` is left out of listings."""

    num_prompts: int
    num_columns: int
    num_expanded: int
    columns: list[Column] | msgspec.UnsetType = msgspec.UNSET


class Result(msgspec.Struct, kw_only=True):
    seq: int
    id: str
    state: str
    custom_id: str | None
    adapter: str | None
    prompt_idx: int | None
    seed: int
    text: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[float] | msgspec.UnsetType = msgspec.UNSET
    finish_reason: str | None
    usage: Usage
    error: JobFailure | None
    finished_at: datetime | None


class Adapter(msgspec.Struct, kw_only=True):
    name: str
    object: Literal["adapter"] = "adapter"
    full_name: str
    revision: str
    digest: str
    max_rank: int
    size_bytes: int
    created_at: datetime
    state: str
    num_revisions: int


def job_of(row: Row[Any]) -> Job:
    """From a row of `batches.read_job`."""
    result = None
    if row.state == "succeeded":
        usage = Usage(row.prompt_tokens, row.completion_tokens)
        result = JobResult(row.text or "", row.token_ids or [], row.logprobs or [], row.finish_reason, usage)
    return Job(
        id=public_id(JOB, row.id),
        batch_id=public_id(BATCH, row.batch_id),
        state=row.state,
        custom_id=row.custom_id,
        adapter=row.adapter,
        revision=_optional_id(REVISION, row.revision_id),
        attempt=row.attempt,
        created_at=row.created_at,
        finished_at=row.finished_at,
        seq=row.seq,
        retry_of=_optional_id(JOB, row.retry_of),
        result=result,
        error=_failure(row),
    )


def result_of(row: Row[Any], *, with_tokens: bool) -> Result:
    """From a row of `batches.read_results`."""
    result = Result(
        seq=row.seq,
        id=public_id(JOB, row.id),
        state=row.state,
        custom_id=row.custom_id,
        adapter=row.adapter,
        prompt_idx=row.prompt_idx,
        seed=row.seed,
        text=row.text,
        finish_reason=row.finish_reason,
        usage=Usage(row.prompt_tokens, row.completion_tokens),
        error=_failure(row),
        finished_at=row.finished_at,
    )
    if with_tokens:
        result.token_ids, result.logprobs = row.token_ids or [], row.logprobs or []
    return result


def batch_of(row: Row[Any]) -> Batch:
    """From a row of `batches.read_batch`."""
    shape = None
    if row.sweep_name is not None:
        shape = SweepShape(row.sweep_name, row.num_prompts, row.num_columns, row.num_expanded)
    # A sweep goes by one id, wherever it is shown.
    prefix = BATCH if shape is None else SWEEP
    return Batch(id=public_id(prefix, row.id), object="batch", name=row.name, sweep=shape, **_batch_fields(row))


def sweep_of(row: Row[Any], columns: list[Column] | msgspec.UnsetType) -> Sweep:
    """From a row of `batches.read_batch` that is a sweep's."""
    return Sweep(
        id=public_id(SWEEP, row.id),
        object="sweep",
        name=row.sweep_name,
        sweep=SweepShape(row.sweep_name, row.num_prompts, row.num_columns, row.num_expanded),
        num_prompts=row.num_prompts,
        num_columns=row.num_columns,
        num_expanded=row.num_expanded,
        columns=columns,
        **_batch_fields(row),
    )


def _batch_fields(row: Row[Any]) -> dict[str, Any]:
    num_ended = row.succeeded + row.failed + row.cancelled + row.expired
    return {
        "state": _batch_state(row),
        "priority": PRIORITY_NAMES[row.priority],
        "deadline_at": row.deadline_at,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "counts": Counts(row.total, row.total - num_ended, row.succeeded, row.failed, row.cancelled, row.expired),
        "usage": Usage(row.prompt_tokens, row.completion_tokens),
        "last_seq": row.last_seq,
    }


def _batch_state(row: Row[Any]) -> str:
    if row.finished_at is not None:
        return "finished"
    if row.cancel_requested_at is not None:
        return "cancelling"
    return "paused" if row.paused_at is not None else "running"


def adapter_of(row: Row[Any], tenant_name: str) -> Adapter:
    """From a row of `adapters.read_adapter`."""
    return Adapter(
        name=row.name,
        full_name=f"{tenant_name}/{row.name}",
        revision=public_id(REVISION, row.revision_id),
        digest=row.digest,
        max_rank=row.max_rank,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        state="ready" if row.quarantined_at is None else "quarantined",
        num_revisions=row.num_revisions,
    )


def _optional_id(prefix: str, value: UUID | None) -> str | None:
    return None if value is None else public_id(prefix, value)


def _failure(row: Row[Any]) -> JobFailure | None:
    if row.error_code is None:
        return None
    return JobFailure(row.error_code, row.error_message or "", row.error_code in RETRYABLE)


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body` as JSON."""
    return Response(_encoder.encode(body), status, headers, media_type="application/json")


def answer_lines(rows: list[Any], headers: Mapping[str, str]) -> Response:
    """`rows` as JSON, one a line."""
    return Response(_encoder.encode_lines(rows), 200, headers, media_type=NDJSON)
