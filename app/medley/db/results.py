"""What is read of jobs and of their results: one by one, in the order of their ends, and as OpenAI's answers show them.

Inputs and results lie in partitions by the job's id: what bounds the id spares a look into each of the other days.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

from sqlalchemy import Connection, CursorResult, Engine, Row, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from medley.db.batches import Select
from medley.db.connections import read_as_tenant
from medley.spec.ids import oldest_after

# Beyond the tokens themselves; read where they are asked for.
_DETAILS = (
    "r.top_token_ids, r.top_logprobs, r.prompt_token_ids, r.prompt_logprobs,"
    " r.prompt_top_token_ids, r.prompt_top_logprobs"
)

_READ_JOB = Select(
    "SELECT j.id, j.tenant_id, j.batch_id, j.state, j.attempt, j.crashes, j.priority, j.created_at, j.leased_at,"
    " j.finished_at, j.is_held, j.is_cancel_requested, j.revision_id, i.custom_id, i.adapter, i.seed, i.retry_of,"
    " i.prompt_idx, i.column_idx, i.sample_idx,"
    " r.seq, r.text, r.token_ids, r.logprobs, r.finish_reason, r.error_code, r.error_message,"
    f" r.prompt_tokens, r.completion_tokens, r.is_greedy, r.retried_by, {_DETAILS}"
    " FROM jobs j JOIN job_inputs i ON i.job_id = j.id AND i.job_id BETWEEN :first AND :last"
    " LEFT JOIN job_results r ON r.job_id = j.id AND r.job_id BETWEEN :first AND :last"
)


def read_job(conn: Connection, job: UUID) -> Row[Any] | None:
    """One job with its input's labels and, once it has ended, its result."""
    return next(iter(read_jobs(conn, [job])), None)


def read_jobs(conn: Connection, jobs: Sequence[UUID]) -> Sequence[Row[Any]]:
    return conn.execute(_READ_JOBS, _of_jobs(jobs)).all() if jobs else []


def read_jobs_as(engine: Engine, tenant: UUID, jobs: Sequence[UUID]) -> list[Any]:
    """`read_jobs` in a transaction of its own, in one round trip; the rows have the same names."""
    return read_as_tenant(engine, tenant, _READ_JOBS_SQL, _of_jobs(jobs)) if jobs else []


_READ_JOBS = _READ_JOB.format_where("j.id = ANY(:ids)")
_READ_JOBS_SQL = str(_READ_JOBS.compile(dialect=PGDialect_psycopg()))  # type: ignore[no-untyped-call]


def _of_jobs(jobs: Sequence[UUID]) -> dict[str, object]:
    return {"ids": list(jobs), "first": min(jobs), "last": max(jobs)}


_READ_RESULTS = (
    "SELECT r.job_id AS id, r.seq, r.state, r.text, r.token_ids, r.logprobs, r.finish_reason, r.error_code,"
    " r.error_message, r.prompt_tokens, r.completion_tokens, r.is_greedy, r.retried_by, i.custom_id, i.adapter, i.seed,"
    " i.retry_of, i.prompt_idx, i.column_idx, i.sample_idx, j.finished_at{details}"
    " FROM job_results r JOIN job_inputs i ON i.job_id = r.job_id JOIN jobs j ON j.id = r.job_id"
    " WHERE r.batch_id = :batch AND r.seq > :after AND r.job_id >= :oldest AND i.job_id >= :oldest"
    " AND (r.retried_by IS NULL OR NOT :only_latest)"
    " ORDER BY r.seq LIMIT :limit"
)
_READ_PLAIN = text(_READ_RESULTS.format(details=""))
# A page with details ends where they come to so many bytes, as they are stored: at the first result or later.
MAX_DETAIL_BYTES = 8 << 20
_DETAIL_BYTES = (
    ", sum(coalesce(pg_column_size(r.top_logprobs), 0) + coalesce(pg_column_size(r.prompt_top_logprobs), 0)"
    " + coalesce(pg_column_size(r.prompt_logprobs), 0)) OVER (ORDER BY r.seq) AS num_bytes"
)
_READ_DETAILED = text(
    f"SELECT * FROM ({_READ_RESULTS.format(details=f', {_DETAILS}{_DETAIL_BYTES}')}) page"
    " WHERE num_bytes <= :max_bytes"
    " OR seq = (SELECT min(r.seq) FROM job_results r WHERE r.batch_id = :batch AND r.seq > :after"
    "  AND (r.retried_by IS NULL OR NOT :only_latest)) ORDER BY seq"
)


def read_results(
    conn: Connection,
    batch: UUID,
    *,
    after: int,
    limit: int,
    with_details: bool = False,
    only_latest: bool = False,
) -> Sequence[Row[Any]]:
    """Results numbered above `after`, in order. Numbers are committed in order, so a reader misses none.

    with_details: with the likeliest tokens and the prompt's log-probabilities, where a job asked for them; fewer than
    `limit` results where these are large. only_latest: without those that a retry has superseded.
    """
    parameters: dict[str, Any] = {
        "batch": batch,
        "after": after,
        "oldest": oldest_after(batch),
        "limit": limit,
        "only_latest": only_latest,
    }
    if not with_details:
        return _named_tuples(conn.execute(_READ_PLAIN, parameters))
    return _named_tuples(conn.execute(_READ_DETAILED, parameters | {"max_bytes": MAX_DETAIL_BYTES}))


def _named_tuples(result: CursorResult[Any]) -> Sequence[Row[Any]]:
    """All rows, as tuples whose fields are at hand: a Row looks each column up (measured: 6 of 42 us a result)."""
    return cast(Sequence[Row[Any]], list(map(_named_tuple(tuple(result.keys())), result.all())))


@lru_cache
def _named_tuple(names: tuple[str, ...]) -> Callable[[Row[Any]], Any]:
    kind: Any = namedtuple("ResultRow", names)  # type: ignore[misc]
    return cast(Callable[[Row[Any]], Any], kind._make)


# A page of first attempts, each followed to the latest by what superseded it; nothing larger than ids goes that way.
# LIMIT keeps each step a look by id: joined, all results of a day might be read for a page.
_ANSWERS = (
    "WITH RECURSIVE firsts AS (SELECT job_id FROM job_inputs WHERE batch_id = :batch AND job_id > :after"
    "  AND job_id >= :oldest AND retry_of IS NULL ORDER BY job_id LIMIT :limit"
    " ), attempts AS ("
    "  SELECT f.job_id AS id, r.job_id, r.retried_by, 0 AS earlier_prompt_tokens, 0 AS earlier_completion_tokens,"
    "   r.prompt_tokens, r.completion_tokens"
    "  FROM firsts f JOIN job_results r ON r.job_id = f.job_id AND r.job_id >= :oldest"
    "  UNION ALL SELECT a.id, r.job_id, r.retried_by, a.earlier_prompt_tokens + a.prompt_tokens,"
    "   a.earlier_completion_tokens + a.completion_tokens, r.prompt_tokens, r.completion_tokens"
    "  FROM attempts a CROSS JOIN LATERAL (SELECT * FROM job_results r WHERE r.job_id = a.retried_by"
    "   AND r.job_id >= :oldest LIMIT 1) r WHERE a.retried_by IS NOT NULL"
    " ), found AS ("
    "  SELECT a.id, a.earlier_prompt_tokens, a.earlier_completion_tokens, i.custom_id, i.adapter, i.sample_idx,"
    "   i.answer, i.prompt, i.prompt_token_ids AS given_ids, r.state, r.text, r.token_ids, r.logprobs,"
    "   r.finish_reason, r.error_code, r.error_message, r.prompt_tokens, r.completion_tokens, j.finished_at,"
    f"  {_DETAILS}{_DETAIL_BYTES.replace('r.seq', 'a.id')}"
    "  FROM attempts a JOIN job_inputs i ON i.job_id = a.id AND i.job_id >= :oldest"
    "  JOIN job_results r ON r.job_id = a.job_id AND r.job_id >= :oldest JOIN jobs j ON j.id = a.job_id"
    "  WHERE a.retried_by IS NULL)"
)
_READ_ANSWERS = text(
    f"{_ANSWERS} SELECT * FROM (SELECT *, row_number() OVER (ORDER BY id) AS place FROM found) page"
    " WHERE num_bytes <= :max_bytes OR place = 1 ORDER BY id"
)


def read_answers(conn: Connection, batch: UUID, *, after: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """Results of a batch as OpenAI's answers show them, in the order in which the jobs were made.

    Of a job that was retried the latest result, under the id of the job that was made first; `earlier_*` are the tokens
    that the others took. after: the last job of the page before. Fewer than `limit` where what jobs asked for is large;
    none at the end.
    """
    oldest = oldest_after(batch)
    parameters = {"batch": batch, "after": after or oldest, "oldest": oldest, "limit": limit}
    return conn.execute(_READ_ANSWERS, parameters | {"max_bytes": MAX_DETAIL_BYTES}).all()


def read_job_ids(conn: Connection, batch: UUID, limit: int) -> list[UUID]:
    """The first `limit` jobs of a batch in the order in which they were made."""
    statement = (
        "SELECT job_id FROM job_inputs WHERE batch_id = :batch AND job_id >= :oldest ORDER BY job_id LIMIT :limit"
    )
    parameters = {"batch": batch, "oldest": oldest_after(batch), "limit": limit}
    return list(conn.execute(text(statement), parameters).scalars())
