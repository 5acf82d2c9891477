"""Batches and their jobs: creation in one transaction, flags, and what a tenant reads of them."""

from __future__ import annotations

import os
import struct
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

from sqlalchemy import Connection, CursorResult, Row, TextClause, text

from medley.db.demand import add_demand, array_literal, lane_of
from medley.db.lanes import Lane, add_lanes
from medley.spec.ids import oldest_after, uuid7s
from medley.spec.sampling import SEED_LIMIT

LOW, NORMAL, HIGH = 0, 1, 2  # priority classes
PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}


class TenantClosing(Exception):
    """The tenant is to be deleted: it makes nothing any more."""


@dataclass(frozen=True)
class NewJob:
    """A job as it is written. `sampling` is JSON without the seed; `seed` None draws one."""

    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    revision: UUID | None
    adapter: str | None
    sampling: str | None
    max_tokens: int
    seed: int | None = None
    custom_id: str | None = None
    retry_of: UUID | None = None
    prompt_idx: int | None = None
    column_idx: int | None = None
    est_prompt_tokens: int | None = None  # of a prompt that is stored elsewhere, or with its continuation
    continuation: str | None = None
    continuation_token_ids: Sequence[int] | None = None
    sample_idx: int | None = None


@dataclass(frozen=True)
class NewBatch:
    id: UUID
    tenant: UUID
    pool: str
    name: str | None = None
    priority: int = NORMAL
    deadline_at: datetime | None = None
    is_single: bool = False  # a job by itself


def open_batch(conn: Connection, batch: NewBatch, *, total: int = 0) -> None:
    """Writes the batch row. `append_jobs` adds jobs, `close_batch` fixes the total; all in one transaction.

    Raises TenantClosing.
    """
    opened = conn.execute(
        text(
            "INSERT INTO batches (id, tenant_id, pool, name, priority, deadline_at, total, is_single)"
            " SELECT :id, t.id, :pool, :name, :priority, :deadline_at, :total, :is_single FROM tenants t"
            " WHERE t.id = :tenant AND t.delete_requested_at IS NULL"
        ),
        {
            "id": batch.id,
            "tenant": batch.tenant,
            "pool": batch.pool,
            "name": batch.name,
            "priority": batch.priority,
            "deadline_at": batch.deadline_at,
            "total": total,
            "is_single": batch.is_single,
        },
    )
    if opened.rowcount == 0:
        raise TenantClosing


# One statement, so that ids travel once; neither part reads what the other writes.
_INSERT = """
WITH made AS (
    INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, is_shared, is_held, priority, est_tokens, deadline_at)
    SELECT r.id, %(tenant)s, %(batch)s, %(pool)s, r.revision, coalesce(r.revision = ANY(%(shared)b::uuid[]), false),
        %(held)s, %(priority)s, r.est_tokens, %(deadline_at)s
    FROM unnest(%(ids)b::uuid[], %(revisions)b::uuid[], %(est_tokens)b::int4[]) AS r(id, revision, est_tokens)
)
INSERT INTO job_inputs (job_id, tenant_id, batch_id, custom_id, adapter, prompt, prompt_token_ids, prompt_idx,
    column_idx, seed, sampling, retry_of, continuation, continuation_token_ids, sample_idx, is_templated, answer)
SELECT r.id, %(tenant)s, %(batch)s, r.custom_id, r.adapter, r.prompt, r.token_ids::int4[], r.prompt_idx,
    r.column_idx, r.seed, r.sampling::jsonb, r.retry_of, r.continuation, r.continuation_ids::int4[], r.sample_idx,
    r.is_templated, r.answer::jsonb
FROM unnest(%(ids)b::uuid[], %(custom_ids)b::text[], %(adapters)b::text[], %(prompts)b::text[], %(token_ids)b::text[],
    %(prompt_idx)b::int4[], %(column_idx)b::int4[], %(seeds)b::int8[], %(samplings)b::text[], %(retries)b::uuid[],
    %(continuations)b::text[], %(continuation_ids)b::text[], %(sample_idx)b::int4[], %(templated)b::bool[],
    %(answers)b::text[])
    AS r(id, custom_id, adapter, prompt, token_ids, prompt_idx, column_idx, seed, sampling, retry_of,
        continuation, continuation_ids, sample_idx, is_templated, answer)
"""


@dataclass(frozen=True, kw_only=True)
class JobColumns:
    """Jobs as columns of equal length, the form in which they are written. `NewJob` says what each holds.

    A column that is None is null in every row.
    """

    revisions: Sequence[UUID | None]
    adapters: Sequence[str | None]
    max_tokens: Sequence[int]
    seeds: Sequence[int | None]
    custom_ids: Sequence[str | None]
    prompts: Sequence[str | None] | None = None
    token_ids: Sequence[Sequence[int] | None] | None = None
    samplings: Sequence[str | None] | None = None
    retries: Sequence[UUID | None] | None = None
    prompt_idx: Sequence[int | None] | None = None
    column_idx: Sequence[int | None] | None = None
    est_prompt_tokens: Sequence[int | None] | None = None
    continuations: Sequence[str | None] | None = None
    continuation_token_ids: Sequence[Sequence[int] | None] | None = None
    sample_idx: Sequence[int | None] | None = None
    templated: Sequence[bool | None] | None = None  # the prompt holds its special tokens: the worker adds none
    answers: Sequence[str | None] | None = None  # JSON: what an OpenAI answer shows of the result

    def __len__(self) -> int:
        return len(self.max_tokens)


def append_jobs(
    conn: Connection, batch: NewBatch, jobs: Sequence[NewJob], *, is_held: bool = False, are_counted: bool = False
) -> list[UUID]:
    """Writes `jobs` (some thousands a call), and what they add to the batch's lanes and to the demand.

    are_counted: the batch's lanes have counted them already. Returns their ids, in order.
    """
    columns = JobColumns(
        revisions=[j.revision for j in jobs],
        adapters=[j.adapter for j in jobs],
        max_tokens=[j.max_tokens for j in jobs],
        seeds=[j.seed for j in jobs],
        custom_ids=[j.custom_id for j in jobs],
        prompts=[j.prompt for j in jobs],
        token_ids=[j.prompt_token_ids for j in jobs],
        samplings=[j.sampling for j in jobs],
        retries=[j.retry_of for j in jobs],
        prompt_idx=[j.prompt_idx for j in jobs],
        column_idx=[j.column_idx for j in jobs],
        est_prompt_tokens=[j.est_prompt_tokens for j in jobs],
        continuations=[j.continuation for j in jobs],
        continuation_token_ids=[j.continuation_token_ids for j in jobs],
        sample_idx=[j.sample_idx for j in jobs],
    )
    ids = append_columns(conn, batch, columns, is_held=is_held)
    lanes = lanes_of(columns)
    if not are_counted:
        add_lanes(conn, batch.id, batch.tenant, lanes)
    if not is_held:
        add_lane_demand(conn, batch, lanes)
    return ids


def lanes_of(jobs: JobColumns) -> list[Lane]:
    """What `jobs` add to the lanes of their batch."""
    names = dict(zip(jobs.revisions, jobs.adapters, strict=True))
    return [Lane(revision, names[revision], num) for revision, num in Counter(jobs.revisions).items()]


def append_columns(
    conn: Connection, batch: NewBatch, jobs: JobColumns, *, is_held: bool = False, after: UUID | None = None
) -> list[UUID]:
    """Writes `jobs` without their demand, which `add_batch_demand` adds. Returns their ids, in order.

    after: a job of the batch that they are to follow, whichever process has made it.
    """
    ids = uuid7s(len(jobs), after=after or batch.id)
    conn.exec_driver_sql(
        _INSERT,
        {
            "tenant": batch.tenant,
            "batch": batch.id,
            "ids": ids,
            "pool": batch.pool,
            "held": is_held,
            "priority": batch.priority,
            "deadline_at": batch.deadline_at,
            "revisions": _whole(jobs.revisions),
            "shared": list(_shared(conn, batch.tenant, jobs.revisions)),
            "est_tokens": _estimates(jobs),
            "custom_ids": _whole(jobs.custom_ids),
            "adapters": _whole(jobs.adapters),
            "prompts": _whole(jobs.prompts),
            "token_ids": _arrays(jobs.token_ids),
            "prompt_idx": _whole(jobs.prompt_idx),
            "column_idx": _whole(jobs.column_idx),
            "seeds": _seeds(jobs.seeds),
            "samplings": _whole(jobs.samplings),
            "retries": _whole(jobs.retries),
            "continuations": _whole(jobs.continuations),
            "continuation_ids": _arrays(jobs.continuation_token_ids),
            "sample_idx": _whole(jobs.sample_idx),
            "templated": _whole(jobs.templated),
            "answers": _whole(jobs.answers),
        },
    )
    return ids


def add_batch_demand(conn: Connection, batch: NewBatch, lanes: Sequence[Lane]) -> None:
    """Adds jobs to the batch's lanes and to the demand, whose rows stay locked until the commit: call it last."""
    add_lanes(conn, batch.id, batch.tenant, lanes)
    add_lane_demand(conn, batch, lanes)


def add_lane_demand(conn: Connection, batch: NewBatch, lanes: Sequence[Lane]) -> None:
    """Adds jobs that the batch's lanes have counted already to the demand, as the last of a transaction's writes."""
    shared = _shared(conn, batch.tenant, (lane.revision for lane in lanes))
    changes = [
        (
            lane_of(batch.tenant, lane.revision, is_shared=lane.revision in shared),
            batch.priority,
            batch.tenant,
            lane.revision,
            lane.num_jobs,
        )
        for lane in lanes
    ]
    add_demand(conn, batch.pool, changes)


def _shared(conn: Connection, tenant: UUID, revisions: Iterable[UUID | None]) -> set[UUID]:
    """Those of `revisions` that are not the tenant's own; also what it may see no longer is none of its own."""
    asked = {revision for revision in revisions if revision is not None}
    if not asked:
        return set()
    own = conn.exec_driver_sql(
        "SELECT id FROM adapter_revisions WHERE id = ANY(%(ids)b::uuid[]) AND tenant_id = %(tenant)s",
        {"ids": list(asked), "tenant": tenant},
    ).scalars()
    return asked - set(own)


def _whole(column: Sequence[Any] | None) -> list[Any] | None:
    """The column, or None (which unnest pads with nulls) where nothing is in it."""
    if column is None or all(value is None for value in column):
        return None
    return list(column)


def _arrays(column: Sequence[Sequence[int] | None] | None) -> list[str | None] | None:
    """A column of arrays, each as its literal."""
    whole = _whole(column)
    return whole and [None if ids is None else array_literal(ids) for ids in whole]


def _seeds(seeds: Sequence[int | None]) -> list[int]:
    """Seeds, drawn where there is none."""
    drawn = struct.unpack(f"={len(seeds)}Q", os.urandom(8 * len(seeds)))
    return [d % SEED_LIMIT if s is None else s for s, d in zip(seeds, drawn, strict=True)]


def _estimates(jobs: JobColumns) -> list[int]:
    """prompt + 2 x expected output tokens a job; text is taken at 4 bytes a token until it is tokenised."""
    num = len(jobs)
    rows = zip(
        jobs.est_prompt_tokens or [None] * num,
        jobs.token_ids or [None] * num,
        jobs.prompts or [None] * num,
        jobs.max_tokens,
        strict=True,
    )
    return [
        (est if est is not None else len(ids) if ids is not None else len(prompt or "") // 4 + 1) + 2 * max_tokens
        for est, ids, prompt, max_tokens in rows
    ]


def deadline_in(conn: Connection, seconds: float) -> datetime:
    """The time that is `seconds` from now on the database's clock."""
    statement = text("SELECT clock_timestamp() + make_interval(secs => :seconds)")
    deadline: datetime = conn.execute(statement, {"seconds": float(seconds)}).scalar_one()
    return deadline


def close_batch(conn: Connection, batch: UUID, total: int) -> None:
    conn.execute(text("UPDATE batches SET total = :total WHERE id = :id"), {"id": batch, "total": total})


def lock_batches(conn: Connection, batches: Iterable[UUID]) -> None:
    """Locks batch rows in id order; every writer of a job's state beyond a claim holds its batch."""
    ids = list(set(batches))
    if ids:
        conn.exec_driver_sql(
            "SELECT FROM batches WHERE id = ANY(%(ids)b::uuid[]) ORDER BY id FOR NO KEY UPDATE", {"ids": ids}
        )


def lock_batches_of(conn: Connection, jobs: Sequence[UUID]) -> None:
    """Locks the batches of `jobs`, in id order."""
    conn.exec_driver_sql(
        "SELECT FROM batches WHERE id IN (SELECT batch_id FROM jobs WHERE id = ANY(%(jobs)b::uuid[]))"
        " ORDER BY id FOR NO KEY UPDATE",
        {"jobs": list(jobs)},
    )


def read_batch(conn: Connection, batch: UUID) -> Row[Any] | None:
    """The batch's row, with its sweep's (`sweep_name`, `num_expanded`, ... null where it is none)."""
    return conn.execute(_READ_BATCHES.format_where("b.id = :id"), {"id": batch}).one_or_none()


def list_batches(conn: Connection, *, before: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """The caller's batches, newest first."""
    statement = _READ_BATCHES.format_where(
        "(CAST(:before AS uuid) IS NULL OR b.id < CAST(:before AS uuid)) ORDER BY b.id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"before": before, "limit": limit}).all()


def list_sweeps(conn: Connection, *, before: UUID | None, limit: int) -> Sequence[Row[Any]]:
    """The caller's batches that are sweeps, newest first."""
    statement = _READ_BATCHES.format_where(
        "s.id IS NOT NULL AND (CAST(:before AS uuid) IS NULL OR b.id < :before) ORDER BY b.id DESC LIMIT :limit"
    )
    return conn.execute(statement, {"before": before, "limit": limit}).all()


class _Select:
    """A SELECT whose WHERE clause is one of this module's constants."""

    def __init__(self, head: str) -> None:
        self._head = head
        self._made: dict[str, TextClause] = {}

    def format_where(self, where: str) -> TextClause:
        if where not in self._made:
            self._made[where] = text(f"{self._head} WHERE {where}")
        return self._made[where]


_READ_BATCHES = _Select(
    "SELECT b.*, s.name AS sweep_name, s.num_prompts, s.num_columns, s.num_expanded,"
    " clock_timestamp() AS read_at, f.ends_at AS expected_at, f.is_late"
    " FROM batches b LEFT JOIN sweeps s ON s.id = b.id"
    " LEFT JOIN batch_forecasts f ON f.batch_id = b.id AND b.finished_at IS NULL"
)

# Beyond the tokens themselves; read where they are asked for.
_DETAILS = (
    "r.top_token_ids, r.top_logprobs, r.prompt_token_ids, r.prompt_logprobs,"
    " r.prompt_top_token_ids, r.prompt_top_logprobs"
)

# Inputs and results lie in partitions by the job's id. What bounds the id spares a look into each of the other days.
_READ_JOB = _Select(
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
    if not jobs:
        return []
    statement = _READ_JOB.format_where("j.id = ANY(:ids)")
    return conn.execute(statement, {"ids": list(jobs), "first": min(jobs), "last": max(jobs)}).all()


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


def read_last_job(conn: Connection, batch: UUID) -> UUID | None:
    """The newest job of a batch."""
    statement = (
        "SELECT job_id FROM job_inputs WHERE batch_id = :batch AND job_id >= :oldest ORDER BY job_id DESC LIMIT 1"
    )
    last: UUID | None = conn.execute(
        text(statement), {"batch": batch, "oldest": oldest_after(batch)}
    ).scalar_one_or_none()
    return last


def read_job_ids(conn: Connection, batch: UUID, limit: int) -> list[UUID]:
    """The first `limit` jobs of a batch in the order in which they were made."""
    statement = (
        "SELECT job_id FROM job_inputs WHERE batch_id = :batch AND job_id >= :oldest ORDER BY job_id LIMIT :limit"
    )
    parameters = {"batch": batch, "oldest": oldest_after(batch), "limit": limit}
    return list(conn.execute(text(statement), parameters).scalars())
