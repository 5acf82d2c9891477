"""The end of a job: the transitions into succeeded, failed, cancelled and expired.

The first terminal write wins and is final. Each writes the result row, its number in the batch (`seq`), the counts
and usage of batch and lane, the tenant's usage, and the events that follow, in one transaction that holds the batch
rows in id order: numbers are committed in order, and every count equals a recount.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection

from medley.db.batches import lock_batches_of
from medley.db.rates import recent_set
from medley.db.webhooks import NOTIFY_COUNTED
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Details, FinishReason, JobState

LOWEST_LOGPROB = -3.4028234663852886e38  # the lowest finite float32


class Result(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a worker has to say of one of its jobs."""

    job: UUID
    attempt: int
    state: JobState
    text: str | None = None
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    finish_reason: FinishReason | None = None
    error: JobError | None = None
    prompt_tokens: int = 0
    details: Details | msgspec.UnsetType = msgspec.UNSET  # of a job that asked for more than its tokens


class Ended(NamedTuple):
    job: UUID
    batch: UUID
    seq: int


@dataclass(frozen=True)
class End:
    """An end without a worker: cancelled, expired, or failed before it could run."""

    state: JobState
    error: JobError | None = None

    @classmethod
    def quarantined(cls) -> End:
        message = "this adapter revision killed engines by itself and was quarantined; upload a corrected one"
        return cls(JobState.FAILED, JobError(code=ErrorCode.ADAPTER_QUARANTINED, message=message))

    @classmethod
    def revoked(cls) -> End:
        message = "this adapter is another tenant's, who shares it no longer"
        return cls(JobState.FAILED, JobError(code=ErrorCode.ADAPTER_REVOKED, message=message))

    @classmethod
    def deleted(cls) -> End:
        message = "this adapter was deleted before the job was made; upload it again and retry"
        return cls(JobState.FAILED, JobError(code=ErrorCode.ADAPTER_UNAVAILABLE, message=message))


# Counts by lane, of batches that are locked: so nobody else writes these rows. They are upserted, not joined: a plan
# made when few were there would read all of them.
_COUNT_LANES = f"""
lanes_ended AS (
    SELECT batch_id, tenant_id, revision_id, count(*) AS num_ended, count(worker_id) AS num_run,
        count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
        count(*) FILTER (WHERE state = 'expired') AS expired,
        sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens
    FROM numbered GROUP BY batch_id, tenant_id, revision_id
), lanes_counted AS (
    INSERT INTO batch_lanes AS l (batch_id, tenant_id, revision_id, succeeded, failed, cancelled, expired,
        prompt_tokens, completion_tokens, recent_num)
    SELECT batch_id, tenant_id, revision_id, succeeded, failed, cancelled, expired, prompt_tokens, completion_tokens,
        num_run
    FROM lanes_ended
    ON CONFLICT (batch_id, revision_id) DO UPDATE SET
        succeeded = l.succeeded + excluded.succeeded, failed = l.failed + excluded.failed,
        cancelled = l.cancelled + excluded.cancelled, expired = l.expired + excluded.expired,
        prompt_tokens = l.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = l.completion_tokens + excluded.completion_tokens,
        {recent_set("l", "excluded.recent_num")}
), failures_counted AS (
    INSERT INTO batch_failures AS f (batch_id, tenant_id, revision_id, code, num_jobs)
    SELECT batch_id, tenant_id, revision_id, coalesce(error_code, 'unknown'), count(*)
    FROM numbered WHERE state = 'failed' GROUP BY 1, 2, 3, 4
    ON CONFLICT (batch_id, revision_id, code) DO UPDATE SET num_jobs = f.num_jobs + excluded.num_jobs
)"""

# `r` is what ended: (ord, job_id, tenant_id, batch_id, revision_id, state, text, ...). The batches are locked, so
# last_seq stands: that alone makes (batch_id, seq) unique, as no index is that holds it over all partitions.
_STORE = (
    """
numbered AS (
    SELECT r.*, b.last_seq + row_number() OVER (PARTITION BY r.batch_id ORDER BY r.ord) AS seq
    FROM r JOIN batches b ON b.id = r.batch_id
), stored AS (
    INSERT INTO job_results (job_id, tenant_id, batch_id, seq, state, text, token_ids, logprobs, finish_reason,
        error_code, error_message, prompt_tokens, completion_tokens, attempt, worker_id{columns})
    SELECT job_id, tenant_id, batch_id, seq, state, text, token_ids::int4[], logprobs::float4[], finish_reason,
        error_code, error_message, prompt_tokens, completion_tokens, attempt, worker_id{columns}
    FROM numbered{details}
), """
    + _COUNT_LANES
    + """, ended AS (
    SELECT batch_id, sum(num_ended)::int8 AS num_ended, sum(num_run)::int8 AS num_run,
        sum(succeeded)::int8 AS succeeded, sum(failed)::int8 AS failed, sum(cancelled)::int8 AS cancelled,
        sum(expired)::int8 AS expired, sum(prompt_tokens)::int8 AS prompt_tokens,
        sum(completion_tokens)::int8 AS completion_tokens
    FROM lanes_ended GROUP BY batch_id
), counted AS (
    UPDATE batches b SET
        succeeded = b.succeeded + c.succeeded, failed = b.failed + c.failed,
        cancelled = b.cancelled + c.cancelled, expired = b.expired + c.expired,
        prompt_tokens = b.prompt_tokens + c.prompt_tokens,
        completion_tokens = b.completion_tokens + c.completion_tokens,
        last_seq = b.last_seq + c.num_ended,
        finished_at = CASE WHEN b.succeeded + b.failed + b.cancelled + b.expired + c.num_ended = b.total
            THEN clock_timestamp() END,
        queued_bytes = CASE WHEN b.succeeded + b.failed + b.cancelled + b.expired + c.num_ended = b.total
            THEN 0 ELSE b.queued_bytes END,
        """
    + recent_set("b", "c.num_run")
    + """
    FROM ended c WHERE b.id = c.batch_id
    RETURNING b.*, c.failed AS failed_now
), notified AS ("""
    + NOTIFY_COUNTED
    + """), dropped AS (
    DELETE FROM checkpoints c USING r WHERE c.job_id = r.job_id
)
"""
)

# Gives back what the queue's quotas counted. Last of all rows, as for whoever reserves: the WHERE makes it wait for
# the part of the statement that it names.
_GIVE_BACK = """, given_back AS (
    INSERT INTO tenant_usage AS u (tenant_id, queued_jobs, queued_bytes)
    SELECT b.tenant_id, -sum(e.num_ended), -sum(CASE WHEN b.succeeded + b.failed + b.cancelled + b.expired + e.num_ended
        = b.total THEN b.queued_bytes ELSE 0 END)
    FROM ended e JOIN batches b ON b.id = e.batch_id WHERE (SELECT count(*) FROM {after}) >= 0
    GROUP BY b.tenant_id ORDER BY b.tenant_id
    ON CONFLICT (tenant_id) DO UPDATE SET queued_jobs = u.queued_jobs + excluded.queued_jobs,
        queued_bytes = u.queued_bytes + excluded.queued_bytes
)
"""

# What workers did for a tenant, by day and adapter revision.
_USE = """, used AS (
    INSERT INTO usage AS u (tenant_id, day, revision_id, num_jobs, prompt_tokens, completion_tokens)
    SELECT tenant_id, (finished_at AT TIME ZONE 'UTC')::date AS day, revision_id, count(*), sum(prompt_tokens),
        sum(completion_tokens)
    FROM r GROUP BY tenant_id, day, revision_id
    ORDER BY tenant_id, day, revision_id
    ON CONFLICT (tenant_id, day, revision_id) DO UPDATE SET num_jobs = u.num_jobs + excluded.num_jobs,
        prompt_tokens = u.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = u.completion_tokens + excluded.completion_tokens RETURNING 1
)"""

_DETAIL_COLUMNS = {
    "top_token_ids": "int4[]",
    "top_logprobs": "float4[]",
    "prompt_token_ids": "int4[]",
    "prompt_logprobs": "float4[]",
    "prompt_top_token_ids": "int4[]",
    "prompt_top_logprobs": "float4[]",
    "is_greedy": "boolean",
}
# A job without details has a row of nulls here, at the cost of a function that is strict.
_STORE_DETAILED = _STORE.format(
    columns="".join(f", {name}" for name in _DETAIL_COLUMNS),
    details=" CROSS JOIN LATERAL json_to_record(details) AS d("
    + ", ".join(f"{name} {kind}" for name, kind in _DETAIL_COLUMNS.items())
    + ")",
)
_STORE_PLAIN = _STORE.format(columns="", details="")

# Results come and numbers go as one JSON document each, at a tenth of the cost of an array a column.
# The fence: (job, attempt, worker) and a live lease. Here and wherever jobs are named by id, coalesce() hides worker
# and state from the planner: statistics from before the queue filled promise it that a worker holds next to nothing,
# and it would compare all that the worker holds with every id (measured: a second for 1,000 of 4,000).
_COMPLETE = (
    """
WITH given AS (
    SELECT * FROM ROWS FROM (json_to_recordset(%(results)s::json) AS (job uuid, attempt int4, state text, text text,
        token_ids int4[], logprobs float4[], finish_reason text, error json, prompt_tokens int4, details json))
    WITH ORDINALITY
    AS g(id, attempt, state, text, token_ids, logprobs, finish_reason, error, prompt_tokens, details, ord)
), matched AS (
    UPDATE jobs j SET state = g.state, worker_id = NULL, finished_at = clock_timestamp()
    FROM given g
    WHERE j.id = g.id AND j.attempt = g.attempt
        AND coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND EXISTS (
        SELECT FROM workers w WHERE w.id = %(worker)s AND w.state <> 'gone' AND w.lease_until > clock_timestamp())
    RETURNING g.ord, j.batch_id, j.tenant_id, j.revision_id, j.pool, j.est_tokens, j.finished_at
), r AS (
    SELECT m.*, g.id AS job_id, g.state, g.text, g.token_ids, g.logprobs, g.finish_reason,
        g.error->>'code' AS error_code, g.error->>'message' AS error_message, coalesce(g.prompt_tokens, 0) AS
        prompt_tokens, CASE WHEN g.finish_reason = 'scored' THEN 0 ELSE coalesce(cardinality(g.token_ids), 0) END AS
        completion_tokens, g.attempt, %(worker)s AS worker_id, g.details
    FROM matched m JOIN given g ON g.ord = m.ord
), """
    + _STORE_DETAILED
    + """, charged AS (
    INSERT INTO counter_changes (pool, tenant_id, service)
    SELECT u.pool, t.id, u.tokens / t.weight FROM (
        SELECT pool, tenant_id, sum(prompt_tokens + 2 * completion_tokens - est_tokens) AS tokens FROM r GROUP BY 1, 2
    ) u JOIN tenants t ON t.id = u.tenant_id
)"""
    + _USE
    + _GIVE_BACK.format(after="used")
    + """SELECT coalesce(json_agg(json_build_array(ord, batch_id, seq) ORDER BY ord), '[]')::text FROM numbered
"""
)
_stored_decoder = msgspec.json.Decoder(list[tuple[int, UUID, int]])


def complete(conn: Connection, worker: UUID, results: Sequence[Result]) -> list[Ended]:
    """Stores a worker's results where (job, attempt, worker) match and its lease lives; the rest is fenced.

    Returns what was stored, in the order of `results`. Corrects the tenants' counters from estimate to usage.
    """
    lock_batches_of(conn, [r.job for r in results])
    stored = conn.exec_driver_sql(_COMPLETE, {"worker": worker, "results": _document(results)}).scalar_one()
    return [Ended(results[ord_ - 1].job, batch, seq) for ord_, batch, seq in _stored_decoder.decode(stored)]


def _document(results: Sequence[Result]) -> str:
    return msgspec.json.encode([_storable(r) for r in results]).decode()


def _storable(result: Result) -> Result:
    """PostgreSQL's text cannot hold NUL, which a model may well generate; JSON cannot hold -inf."""
    if result.text is not None and "\0" in result.text:
        result = msgspec.structs.replace(result, text=result.text.replace("\0", "\ufffd"))
    if result.details is not msgspec.UNSET:
        result = msgspec.structs.replace(result, details=storable_details(result.details))
    logprobs = finite(result.logprobs)
    return result if logprobs is result.logprobs else msgspec.structs.replace(result, logprobs=logprobs)


def storable_details(details: Details) -> Details:
    """Details whose log-probabilities are finite, as `finite` has them."""
    prompt_logprobs = details.prompt_logprobs
    return msgspec.structs.replace(
        details,
        top_logprobs=tuple(finite(details.top_logprobs)),
        prompt_logprobs=None if prompt_logprobs is None else tuple(finite(prompt_logprobs)),
        prompt_top_logprobs=tuple(finite(details.prompt_top_logprobs)),
    )


def finite(logprobs: Sequence[float]) -> Sequence[float]:
    """Log-probabilities as they are stored: for -inf, of a token that the model rules out, the lowest float32.

    Raises ValueError for NaN and +inf, which are no log-probabilities; as JSON they would silently become NULL.
    """
    if math.isfinite(sum(logprobs)):
        return logprobs
    for logprob in logprobs:
        if math.isnan(logprob) or logprob == math.inf:
            raise ValueError(f"logprobs: got {logprob}, wanted finite numbers or -inf")
    return [max(logprob, LOWEST_LOGPROB) for logprob in logprobs]


# Ends without a worker are set-based: a batch of a million queued jobs is cancelled by one statement.
_END_UNCLAIMED = (
    """
WITH left_queue AS (
    UPDATE jobs j SET state = %(state)s, worker_id = NULL, finished_at = clock_timestamp()
    FROM (SELECT j.id, j.is_held FROM jobs j WHERE {which} AND j.state = 'queued' FOR UPDATE) was
    WHERE j.id = was.id AND j.state = 'queued'
    RETURNING j.id, j.tenant_id, j.batch_id, j.pool, j.lane, j.priority, j.revision_id, j.attempt, was.is_held
), r AS (
    SELECT id AS job_id, tenant_id, batch_id, pool, lane, priority, revision_id, is_held, attempt,
        %(state)s::text AS state, NULL::text AS text, NULL::text AS token_ids, NULL::text AS logprobs,
        NULL::text AS finish_reason, %(code)s::text AS error_code, %(message)s::text AS error_message,
        0 AS prompt_tokens, 0 AS completion_tokens, NULL::uuid AS worker_id,
        row_number() OVER (ORDER BY id) AS ord
    FROM left_queue
), """
    + _STORE_PLAIN
    + """, undemanded AS (
    INSERT INTO demand_changes (pool, lane, priority, tenant_id, revision_id, num_queued)
    SELECT pool, lane, priority, tenant_id, revision_id, -count(*) FROM r WHERE NOT is_held
    GROUP BY pool, lane, priority, tenant_id, revision_id
)"""
    + _GIVE_BACK.format(after="numbered")
    + """SELECT count(*) FROM numbered
"""
)
_END_JOBS = _END_UNCLAIMED.format(which="j.id = ANY(%(jobs)b::uuid[])")


def _end_parameters(end: End) -> dict[str, object]:
    return {
        "state": end.state.value,
        "code": end.error and end.error.code.value,
        "message": end.error and end.error.message,
    }


def end_unclaimed(conn: Connection, jobs: Sequence[UUID], end: End) -> int:
    """Ends those of `jobs` that are still queued. Returns how many."""
    lock_batches_of(conn, jobs)
    count: int = conn.exec_driver_sql(_END_JOBS, {"jobs": list(jobs), **_end_parameters(end)}).scalar_one()
    return count
