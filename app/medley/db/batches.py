"""Batches and their jobs: creation in one transaction, flags, and what a tenant reads of them."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.demand import add_demand, array_literal
from medley.spec.ids import uuid7s
from medley.spec.sampling import SEED_LIMIT

LOW, NORMAL, HIGH = 0, 1, 2  # priority classes
PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}


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
    est_prompt_tokens: int | None = None  # of a prompt that is stored elsewhere


@dataclass(frozen=True)
class NewBatch:
    id: UUID
    tenant: UUID
    pool: str
    name: str | None = None
    priority: int = NORMAL
    deadline_at: datetime | None = None


def open_batch(conn: Connection, batch: NewBatch, *, total: int = 0) -> None:
    """Writes the batch row. `append_jobs` adds jobs, `close_batch` fixes the total; all in one transaction."""
    conn.execute(
        text(
            "INSERT INTO batches (id, tenant_id, pool, name, priority, deadline_at, total)"
            " VALUES (:id, :tenant, :pool, :name, :priority, :deadline_at, :total)"
        ),
        {
            "id": batch.id,
            "tenant": batch.tenant,
            "pool": batch.pool,
            "name": batch.name,
            "priority": batch.priority,
            "deadline_at": batch.deadline_at,
            "total": total,
        },
    )


# One statement, so that ids travel once; neither part reads what the other writes.
_INSERT = """
WITH made AS (
    INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, is_held, priority, est_tokens, deadline_at)
    SELECT r.id, %(tenant)s, %(batch)s, %(pool)s, r.revision, %(held)s, %(priority)s, r.est_tokens, %(deadline_at)s
    FROM unnest(%(ids)b::uuid[], %(revisions)b::uuid[], %(est_tokens)b::int4[]) AS r(id, revision, est_tokens)
)
INSERT INTO job_inputs (job_id, tenant_id, batch_id, custom_id, adapter, prompt, prompt_token_ids, prompt_idx,
    column_idx, seed, sampling, retry_of)
SELECT r.id, %(tenant)s, %(batch)s, r.custom_id, r.adapter, r.prompt, r.token_ids::int4[], r.prompt_idx,
    r.column_idx, r.seed, r.sampling::jsonb, r.retry_of
FROM unnest(%(ids)b::uuid[], %(custom_ids)b::text[], %(adapters)b::text[], %(prompts)b::text[], %(token_ids)b::text[],
    %(prompt_idx)b::int4[], %(column_idx)b::int4[], %(seeds)b::int8[], %(samplings)b::text[], %(retries)b::uuid[])
    AS r(id, custom_id, adapter, prompt, token_ids, prompt_idx, column_idx, seed, sampling, retry_of)
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

    def __len__(self) -> int:
        return len(self.max_tokens)


def append_jobs(conn: Connection, batch: NewBatch, jobs: Sequence[NewJob], *, is_held: bool = False) -> list[UUID]:
    """Writes `jobs` (some thousands a call) and what they add to the demand. Returns their ids, in order."""
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
    )
    ids = append_columns(conn, batch, columns, is_held=is_held)
    if not is_held:
        add_batch_demand(conn, batch, Counter(j.revision for j in jobs))
    return ids


def append_columns(conn: Connection, batch: NewBatch, jobs: JobColumns, *, is_held: bool = False) -> list[UUID]:
    """Writes `jobs` without their demand, which `add_batch_demand` adds. Returns their ids, in order."""
    ids = uuid7s(len(jobs))
    token_ids = _whole(jobs.token_ids)
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
            "est_tokens": _estimates(jobs),
            "custom_ids": _whole(jobs.custom_ids),
            "adapters": _whole(jobs.adapters),
            "prompts": _whole(jobs.prompts),
            "token_ids": token_ids and [None if t is None else array_literal(t) for t in token_ids],
            "prompt_idx": _whole(jobs.prompt_idx),
            "column_idx": _whole(jobs.column_idx),
            "seeds": _seeds(jobs.seeds),
            "samplings": _whole(jobs.samplings),
            "retries": _whole(jobs.retries),
        },
    )
    return ids


def add_batch_demand(conn: Connection, batch: NewBatch, num_jobs: Mapping[UUID | None, int]) -> None:
    """Adds jobs a revision (None: the base) to the demand. Rows of it stay locked until the commit, so last."""
    changes = [(rev or batch.tenant, batch.priority, batch.tenant, rev, n) for rev, n in num_jobs.items()]
    add_demand(conn, batch.pool, changes)


def _whole(column: Sequence[Any] | None) -> list[Any] | None:
    """The column, or None (which unnest pads with nulls) where nothing is in it."""
    if column is None or all(value is None for value in column):
        return None
    return list(column)


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

    def format_where(self, where: str) -> Any:
        return text(f"{self._head} WHERE {where}")


_READ_BATCHES = _Select(
    "SELECT b.*, s.name AS sweep_name, s.num_prompts, s.num_columns, s.num_expanded,"
    " clock_timestamp() AS read_at FROM batches b LEFT JOIN sweeps s ON s.id = b.id"
)

_READ_JOB = _Select(
    "SELECT j.id, j.tenant_id, j.batch_id, j.state, j.attempt, j.crashes, j.priority, j.created_at, j.leased_at,"
    " j.finished_at, j.is_held, j.is_cancel_requested, j.revision_id, i.custom_id, i.adapter, i.seed, i.retry_of,"
    " i.prompt_idx, i.column_idx,"
    " r.seq, r.text, r.token_ids, r.logprobs, r.finish_reason, r.error_code, r.error_message,"
    " r.prompt_tokens, r.completion_tokens"
    " FROM jobs j JOIN job_inputs i ON i.job_id = j.id LEFT JOIN job_results r ON r.job_id = j.id"
)


def read_job(conn: Connection, job: UUID) -> Row[Any] | None:
    """One job with its input's labels and, once it has ended, its result."""
    return conn.execute(_READ_JOB.format_where("j.id = :id"), {"id": job}).one_or_none()


def read_jobs(conn: Connection, jobs: Sequence[UUID]) -> Sequence[Row[Any]]:
    return conn.execute(_READ_JOB.format_where("j.id = ANY(:ids)"), {"ids": list(jobs)}).all()


_READ_RESULTS = text(
    "SELECT r.job_id AS id, r.batch_id, r.seq, r.state, r.text, r.token_ids, r.logprobs, r.finish_reason,"
    " r.error_code, r.error_message, r.prompt_tokens, r.completion_tokens, r.attempt,"
    " i.custom_id, i.adapter, i.seed, i.retry_of, i.prompt_idx, i.column_idx, j.created_at, j.finished_at"
    " FROM job_results r JOIN job_inputs i ON i.job_id = r.job_id JOIN jobs j ON j.id = r.job_id"
    " WHERE r.batch_id = :batch AND r.seq > :after ORDER BY r.seq LIMIT :limit"
)


def read_results(conn: Connection, batch: UUID, *, after: int, limit: int) -> Sequence[Row[Any]]:
    """Results numbered above `after`, in order. Numbers are committed in order, so a reader misses none."""
    return conn.execute(_READ_RESULTS, {"batch": batch, "after": after, "limit": limit}).all()


def read_job_ids(conn: Connection, batch: UUID, limit: int) -> list[UUID]:
    """The first `limit` jobs of a batch in the order in which they were made."""
    statement = "SELECT job_id FROM job_inputs WHERE batch_id = :batch ORDER BY job_id LIMIT :limit"
    return list(conn.execute(text(statement), {"batch": batch, "limit": limit}).scalars())
