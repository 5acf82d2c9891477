"""What the service answers, as typed values. Times are aware datetimes, durations seconds."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import msgspec

from medley.spec.paired import DiffColumn
from medley.spec.statistics import ReportColumn


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job has no result."""

    code: str
    message: str
    retryable: bool = False


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Of a continuation: its log-probability given the prompt, and whether greedy decoding would have written it."""

    logprob: float
    is_greedy: bool


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A job's result. `logprobs[i]` is the log-probability of `token_ids[i]` under the model, before sampling;
    where that is -inf (only a bias let the token through), it is the lowest float32, -3.4e38.

    top_token_ids[i], top_logprobs[i]: the likeliest tokens at the place of token_ids[i], best first, for a job with
    `top_logprobs`. prompt_*: for one with `prompt_logprobs`; they begin with None, as nothing is before the first
    token. score: of a job with a continuation, whose tokens are token_ids then.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    usage: Usage = Usage()
    score: Score | None = None
    top_token_ids: tuple[tuple[int, ...], ...] | None = None
    top_logprobs: tuple[tuple[float, ...], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_token_ids: tuple[tuple[int, ...] | None, ...] | None = None
    prompt_top_logprobs: tuple[tuple[float, ...] | None, ...] | None = None


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it stands."""

    id: str
    batch_id: str
    state: str
    custom_id: str | None = None
    adapter: str | None = None
    revision: str | None = None
    attempt: int = 0
    created_at: datetime | None = None
    finished_at: datetime | None = None
    seq: int | None = None
    retry_of: str | None = None
    retried_by: str | None = None
    sample_idx: int | None = None
    result: Completion | None = None
    error: Failure | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("queued", "leased")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One ended job of a batch, as the results cursor gives it; `seq` is its place in the order of ends.

    sample_idx: which of several samples of one prompt. The fields from token_ids on are there where tokens were asked
    for, see `Completion`.
    """

    seq: int
    id: str
    state: str
    custom_id: str | None = None
    adapter: str | None = None
    prompt_idx: int | None = None
    seed: int | None = None
    sample_idx: int | None = None
    score: Score | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    top_token_ids: tuple[tuple[int, ...], ...] | None = None
    top_logprobs: tuple[tuple[float, ...], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_token_ids: tuple[tuple[int, ...] | None, ...] | None = None
    prompt_top_logprobs: tuple[tuple[float, ...] | None, ...] | None = None
    finish_reason: str | None = None
    usage: Usage = Usage()
    error: Failure | None = None
    finished_at: datetime | None = None
    retry_of: str | None = None
    retried_by: str | None = None


class ResultPage(msgspec.Struct, frozen=True, kw_only=True):
    results: tuple[Result, ...]
    next: int
    finished: bool


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    total: int
    queued_or_running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    retried: int = 0  # results that a retry has superseded; the others are of the latest attempts

    @property
    def ended(self) -> int:
        return self.total - self.queued_or_running


class SweepShape(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_prompts: int
    num_columns: int
    num_expanded: int


class BatchStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it stands; `sweep` where the service made it from prompts x adapters.

    rate: jobs a second of late. expected_at: when it will be done, as the service sees it now. is_late: that is after
    its deadline.
    """

    id: str
    state: str
    counts: Counts
    usage: Usage
    name: str | None = None
    priority: str = "normal"
    deadline_at: datetime | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None
    last_seq: int = 0
    rate: float | None = None
    expected_at: datetime | None = None
    is_late: bool = False
    sweep: SweepShape | None = None
    job_ids: tuple[str, ...] | None = None

    @property
    def has_finished(self) -> bool:
        return self.finished_at is not None


class BatchAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch has for one adapter (None: the base); `failures` by code.

    rate: jobs a second of late. expected_at: when it will be done at that rate.
    """

    adapter: str | None
    revision: str | None
    counts: Counts
    usage: Usage
    failures: dict[str, int] = {}
    rate: float | None = None
    expected_at: datetime | None = None


class BatchAdapters(msgspec.Struct, frozen=True, kw_only=True):
    batch: BatchStatus
    adapters: tuple[BatchAdapter, ...]


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter with its newest revision."""

    name: str
    full_name: str
    revision: str
    digest: str
    max_rank: int
    size_bytes: int
    state: str
    num_revisions: int = 1
    created_at: datetime | None = None


class AdapterGrant(msgspec.Struct, frozen=True, kw_only=True):
    """That another tenant may use an adapter: all its revisions, or one."""

    id: str
    adapter: str
    tenant: str
    revision: str | None = None
    created_at: datetime | None = None


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    sweep: BatchStatus
    columns: tuple[ReportColumn, ...]

    @property
    def adapters(self) -> tuple[ReportColumn, ...]:
        return tuple(c for c in self.columns if c.adapter is not None)

    @property
    def base(self) -> ReportColumn | None:
        return next((c for c in self.columns if c.adapter is None), None)


class SweepDiff(msgspec.Struct, frozen=True, kw_only=True):
    """Columns of `sweep` against those of `with_sweep`; seed and num_resamples are the bootstrap's."""

    sweep: str
    with_sweep: str
    seed: int
    num_resamples: int
    columns: tuple[DiffColumn, ...]


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that workers ended and the tokens they took, of a day, an adapter or a revision (all None: the base)."""

    num_jobs: int
    prompt_tokens: int
    completion_tokens: int
    day: date | None = None
    adapter: str | None = None
    revision: str | None = None


class UsageReport(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """Usage of the days `first` to `last` (UTC), both included."""

    first: date
    last: date
    by: str
    rows: tuple[UsageRow, ...]
    total: UsageRow


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that is told of events. `secret` is there only when it has just been made."""

    id: str
    url: str
    events: tuple[str, ...]
    state: str
    created_at: datetime
    description: str | None = None
    batch_id: str | None = None
    failed_jobs: int | None = None
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    num_pending: int = 0
    previous_secret_until: datetime | None = None
    secret: str | None = None


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event on its way to an endpoint."""

    id: str
    event: str
    state: str
    attempt: int
    created_at: datetime
    next_attempt_at: datetime | None = None
    ended_at: datetime | None = None
    status: int | None = None
    error: str | None = None
    payload: dict[str, Any] = {}


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker of the pool; `stats` are its engine's totals since it started."""

    id: str
    state: str
    desired_state: str
    max_num_seqs: int
    num_leased: int
    num_resident: int = 0
    stats: dict[str, Any] = {}


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """An API key. `id` is its public part; `api_key`, the whole, is there where it was just made."""

    id: str
    name: str | None
    scopes: tuple[str, ...]
    state: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    replaces: str | None = None
    api_key: str | None = None


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """`used` is None of a rate."""

    limit: float
    used: float | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the tenant may have, and what one request may hold."""

    tenant: str
    quotas: dict[str, Quota]
    request: dict[str, int]


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was changed by hand; `key_id` None: by the operator."""

    number: int
    at: datetime
    key_id: str | None
    action: str
    object: str
    details: dict[str, Any]
    request_id: str | None = None
    client_address: str | None = None
