"""The JSON that resources have: one struct a kind, and the rows they are made from.

Knows rows and public ids; reads nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

import msgspec
from fastapi import Response
from sqlalchemy import Row

from medley.db.batches import PRIORITIES
from medley.db.rates import end_at_rate, read_rate
from medley.spec.errors import RETRYABLE
from medley.spec.ids import BATCH, GRANT, JOB, REVISION, SWEEP, public_id

T = TypeVar("T")
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


class Score(msgspec.Struct):
    """Of a continuation: its log-probability given the prompt, and whether greedy decoding would have written it."""

    logprob: float
    is_greedy: bool


class Details(msgspec.Struct, kw_only=True):
    """What a job asked for beyond its tokens. A prompt's lists begin with null: nothing is before its first token."""

    top_token_ids: list[list[int]] | msgspec.UnsetType = msgspec.UNSET
    top_logprobs: list[list[float]] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[float | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_top_token_ids: list[list[int] | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_top_logprobs: list[list[float] | None] | msgspec.UnsetType = msgspec.UNSET


class JobResult(Details, kw_only=True):
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    usage: Usage
    score: Score | msgspec.UnsetType = msgspec.UNSET


class Job(msgspec.Struct, kw_only=True):
    """A job as it stands; `result` or `error` once it has ended."""

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
    retried_by: str | None
    sample_idx: int | msgspec.UnsetType = msgspec.UNSET
    result: JobResult | None
    error: JobFailure | None


class AdapterCounts(msgspec.Struct):
    """Of the latest attempts."""

    total: int
    queued_or_running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int


class Counts(AdapterCounts):
    """Of the latest attempts; `retried` are the results that those supersede."""

    retried: int


class SweepShape(msgspec.Struct):
    name: str
    num_prompts: int
    num_columns: int
    num_expanded: int


class Batch(msgspec.Struct, kw_only=True):
    """A batch as it stands; `job_ids` in the order sent, in the answer to its create and where they are few."""

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
    rate: float | None  # jobs a second of late
    expected_at: datetime | None  # when it will be done, as the dispatcher sees it now; null while that is not known
    is_late: bool  # that is after its deadline
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


class Result(Details, kw_only=True):
    seq: int
    id: str
    state: str
    custom_id: str | None
    adapter: str | None
    prompt_idx: int | None
    seed: int
    sample_idx: int | msgspec.UnsetType = msgspec.UNSET
    score: Score | msgspec.UnsetType = msgspec.UNSET
    text: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[float] | msgspec.UnsetType = msgspec.UNSET
    finish_reason: str | None
    usage: Usage
    error: JobFailure | None
    finished_at: datetime | None
    retry_of: str | None
    retried_by: str | None


class BatchAdapter(msgspec.Struct, kw_only=True):
    """What a batch has for one adapter revision (None: the base)."""

    adapter: str | None
    revision: str | None
    counts: AdapterCounts
    usage: Usage
    failures: dict[str, int]  # by code
    rate: float | None  # jobs a second of late
    expected_at: datetime | None  # when it will be done, at that rate


class Adapter(msgspec.Struct, kw_only=True):
    """An adapter with its newest revision."""

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


class AdapterGrant(msgspec.Struct, kw_only=True):
    """That another tenant may use an adapter. `revision` None: every revision of the adapter."""

    id: str
    object: Literal["adapter_grant"] = "adapter_grant"
    adapter: str
    tenant: str
    revision: str | None
    created_at: datetime


def job_of(row: Row[Any]) -> Job:
    """From a row of `results.read_job`."""
    result = None
    if row.state == "succeeded":
        result = JobResult(
            text=row.text or "",
            token_ids=row.token_ids or [],
            logprobs=row.logprobs or [],
            finish_reason=row.finish_reason,
            usage=Usage(row.prompt_tokens, row.completion_tokens),
            score=_score(row),
        )
        _add_details(result, row)
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
        retried_by=_optional_id(JOB, row.retried_by),
        sample_idx=_or_unset(row.sample_idx),
        result=result,
        error=_failure(row),
    )


def result_of(row: Row[Any], *, with_tokens: bool) -> Result:
    """From a row of `results.read_results`; with tokens, of one that was read with details."""
    result = Result(
        seq=row.seq,
        id=public_id(JOB, row.id),
        state=row.state,
        custom_id=row.custom_id,
        adapter=row.adapter,
        prompt_idx=row.prompt_idx,
        seed=row.seed,
        sample_idx=_or_unset(row.sample_idx),
        score=_score(row),
        text=row.text,
        finish_reason=row.finish_reason,
        usage=Usage(row.prompt_tokens, row.completion_tokens),
        error=_failure(row),
        finished_at=row.finished_at,
        retry_of=_optional_id(JOB, row.retry_of),
        retried_by=_optional_id(JOB, row.retried_by),
    )
    if with_tokens:
        result.token_ids, result.logprobs = row.token_ids or [], row.logprobs or []
        _add_details(result, row)
    return result


def _score(row: Row[Any]) -> Score | msgspec.UnsetType:
    # A sum of the lowest float32s is still a double.
    return msgspec.UNSET if row.is_greedy is None else Score(sum(row.logprobs), row.is_greedy)


def details_of(row: Row[Any]) -> Details:
    """From a row that was read with details."""
    found = Details()
    _add_details(found, row)
    return found


def _add_details(into: Details, row: Row[Any]) -> None:
    if row.top_token_ids is not None:
        num = len(row.token_ids or ())
        into.top_token_ids, into.top_logprobs = _by_place(row.top_token_ids, num), _by_place(row.top_logprobs, num)
    if row.prompt_logprobs is not None:
        num = len(row.prompt_logprobs)
        into.prompt_token_ids, into.prompt_logprobs = row.prompt_token_ids, [None, *row.prompt_logprobs]
        if row.prompt_top_token_ids is not None:
            into.prompt_top_token_ids = [None, *_by_place(row.prompt_top_token_ids, num)]
            into.prompt_top_logprobs = [None, *_by_place(row.prompt_top_logprobs, num)]


def _by_place(flat: list[T], num_places: int) -> list[list[T]]:
    """As many of `flat` for each place."""
    k = len(flat) // max(1, num_places)
    return [flat[i * k : (i + 1) * k] for i in range(num_places)]


def _or_unset(value: T | None) -> T | msgspec.UnsetType:
    return msgspec.UNSET if value is None else value


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
    state = _batch_state(row)
    expected_at = None if state == "paused" else row.expected_at
    return {
        "state": state,
        "priority": PRIORITY_NAMES[row.priority],
        "deadline_at": row.deadline_at,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "counts": Counts(row.total, _num_left(row), row.succeeded, row.failed, row.cancelled, row.expired, row.retried),
        "usage": Usage(row.prompt_tokens, row.completion_tokens),
        "last_seq": row.last_seq,
        "rate": None if state == "finished" else read_rate(row),
        "expected_at": expected_at,
        "is_late": expected_at is not None and row.is_late,
    }


def _num_left(row: Row[Any]) -> int:
    num: int = row.total - row.succeeded - row.failed - row.cancelled - row.expired
    return num


def batch_adapter_of(row: Row[Any]) -> BatchAdapter:
    """From a row of `lanes.read_lanes`."""
    num_left = _num_left(row)
    return BatchAdapter(
        adapter=row.adapter,
        revision=_optional_id(REVISION, row.revision_id),
        counts=AdapterCounts(row.total, num_left, row.succeeded, row.failed, row.cancelled, row.expired),
        usage=Usage(row.prompt_tokens, row.completion_tokens),
        failures=row.failures or {},
        rate=read_rate(row) if num_left else None,
        expected_at=end_at_rate(row, num_left),
    )


def _batch_state(row: Row[Any]) -> str:
    if row.finished_at is not None:
        return "finished"
    if row.cancel_requested_at is not None:
        return "cancelling"
    return "paused" if row.paused_at is not None else "running"


def adapter_of(row: Row[Any], tenant_name: str) -> Adapter:
    """From a row of `adapters.read_adapter`."""
    return _adapter(row, tenant_name, row.num_revisions)


def shared_adapter_of(row: Row[Any], num_revisions: int) -> Adapter:
    """From a row of `grants.read_shared`."""
    return _adapter(row, row.owner, num_revisions)


def _adapter(row: Row[Any], owner: str, num_revisions: int) -> Adapter:
    return Adapter(
        name=row.name,
        full_name=f"{owner}/{row.name}",
        revision=public_id(REVISION, row.revision_id),
        digest=row.digest,
        max_rank=row.max_rank,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        state="ready" if row.quarantined_at is None else "quarantined",
        num_revisions=num_revisions,
    )


def grant_of(row: Row[Any]) -> AdapterGrant:
    """From a row of `grants.list_grants`."""
    return AdapterGrant(
        id=public_id(GRANT, row.id),
        adapter=row.name,
        tenant=row.grantee,
        revision=_optional_id(REVISION, row.revision_id),
        created_at=row.created_at,
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
