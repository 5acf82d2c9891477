"""Jobs as they are made: as columns, by one statement, with what they add to their batch's lanes and to the demand."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.batches import NewBatch
from medley.db.demand import Change, add_demand, array_literal, lane_of
from medley.db.lanes import Lane, add_lanes
from medley.spec.ids import oldest_after, uuid7s
from medley.spec.sampling import SEED_LIMIT


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
    """Adds jobs to the batch's lanes and to the demand."""
    add_lanes(conn, batch.id, batch.tenant, lanes)
    add_lane_demand(conn, batch, lanes)


def add_lane_demand(conn: Connection, batch: NewBatch, lanes: Sequence[Lane]) -> None:
    """Adds jobs that the batch's lanes have counted already to the demand."""
    shared = _shared(conn, batch.tenant, (lane.revision for lane in lanes))
    changes = [
        Change(
            lane_of(batch.tenant, lane.revision, is_shared=lane.revision in shared),
            batch.priority,
            batch.tenant,
            lane.revision,
            lane.num_jobs,
            first=batch.id,
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


def read_last_job(conn: Connection, batch: UUID) -> UUID | None:
    """The newest job of a batch."""
    statement = (
        "SELECT job_id FROM job_inputs WHERE batch_id = :batch AND job_id >= :oldest ORDER BY job_id DESC LIMIT 1"
    )
    last: UUID | None = conn.execute(
        text(statement), {"batch": batch, "oldest": oldest_after(batch)}
    ).scalar_one_or_none()
    return last
