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


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A job's result. `logprobs[i]` is the log-probability of `token_ids[i]` under the model, before sampling;
    where that is -inf (only a bias let the token through), it is the lowest float32, -3.4e38.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    usage: Usage = Usage()


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
    result: Completion | None = None
    error: Failure | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("queued", "leased")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One ended job of a batch, as the results cursor gives it; `seq` is its place in the order of ends."""

    seq: int
    id: str
    state: str
    custom_id: str | None = None
    adapter: str | None = None
    prompt_idx: int | None = None
    seed: int | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
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
    """A batch as it stands; `sweep` where the service made it from prompts x adapters."""

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
    rate: float | None = None  # jobs a second of late
    eta_s: float | None = None
    sweep: SweepShape | None = None
    job_ids: tuple[str, ...] | None = None

    @property
    def has_finished(self) -> bool:
        return self.finished_at is not None


class BatchAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch has for one adapter (None: the base); `failures` by code."""

    adapter: str | None
    revision: str | None
    counts: Counts
    usage: Usage
    failures: dict[str, int] = {}
    rate: float | None = None
    eta_s: float | None = None


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
