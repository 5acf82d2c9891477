"""What a worker reads of the jobs assigned to it."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import msgspec
from sqlalchemy import Connection, text

from medley.spec.jobs import Checkpoint
from medley.spec.sampling import SamplingParams


class Continuation(msgspec.Struct, frozen=True, gc=False):
    """What is to be scored given the prompt: text or token ids."""

    text: str | None
    token_ids: tuple[int, ...] | None


class Assigned(msgspec.Struct, frozen=True, gc=False):
    """One job as its worker needs it. `digest` addresses the adapter's files in the store (None: the base)."""

    job: UUID
    attempt: int
    tenant: UUID
    revision: UUID | None
    digest: str | None
    prompt: str | None
    prompt_token_ids: tuple[int, ...] | None
    sampling: SamplingParams
    checkpoint: Checkpoint | None
    priority: int
    step_limit: int | None
    is_quarantined: bool  # its adapter revision is: it must not run
    is_revoked: bool = False  # its adapter revision is another tenant's, who does not share it: it must not run
    continuation: Continuation | None = None
    is_templated: bool = False  # the prompt holds its special tokens: none are added
    is_cancelled: bool = False  # the job, or its batch, since it was claimed or before: it must not run


# One JSON document of rows that decode as they are: a Python object a column costs more than the query.
_FETCH = """
SELECT coalesce(json_agg(f), '[]')::text FROM (
    SELECT j.id AS job, j.attempt, j.tenant_id AS tenant, j.revision_id AS revision, a.digest, j.priority, j.step_limit,
        a.quarantined_at IS NOT NULL AS is_quarantined, coalesce(i.is_templated, false) AS is_templated,
        coalesce(a.tenant_id <> j.tenant_id AND NOT medley_may_use(j.tenant_id, a.id), false) AS is_revoked,
        j.is_cancel_requested OR b.cancel_requested_at IS NOT NULL AS is_cancelled,
        coalesce(i.prompt, p.prompt) AS prompt,
        coalesce(i.prompt_token_ids, p.prompt_token_ids) AS prompt_token_ids,
        coalesce(i.sampling, s.sampling) || jsonb_build_object('seed', i.seed) AS sampling,
        CASE WHEN c.job_id IS NOT NULL
            THEN json_build_object('token_ids', c.token_ids, 'logprobs', c.logprobs, 'details', c.details) END
            AS checkpoint,
        CASE WHEN num_nonnulls(i.continuation, i.continuation_token_ids, p.continuation, p.continuation_token_ids) > 0
            THEN json_build_object('text', coalesce(i.continuation, p.continuation), 'token_ids',
                coalesce(i.continuation_token_ids, p.continuation_token_ids)) END AS continuation
    FROM jobs j JOIN job_inputs i ON i.job_id = j.id AND i.job_id BETWEEN %(first)s AND %(last)s
    JOIN batches b ON b.id = j.batch_id
    LEFT JOIN sweep_prompts p ON p.sweep_id = j.batch_id AND p.prompt_idx = i.prompt_idx
    LEFT JOIN sweeps s ON i.sampling IS NULL AND s.id = j.batch_id
    LEFT JOIN adapter_revisions a ON a.id = j.revision_id
    LEFT JOIN checkpoints c ON c.job_id = j.id
    WHERE coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND j.id = ANY(%(jobs)b::uuid[])
    ORDER BY j.priority DESC, j.leased_at, j.id
) f
"""
_assigned_decoder = msgspec.json.Decoder(list[Assigned])


def fetch_inputs(conn: Connection, worker: UUID, jobs: Sequence[UUID]) -> list[Assigned]:
    """The inputs of those of `jobs` that are assigned to `worker` now, in one query; the rest is left out.

    Raises msgspec.ValidationError where a row holds what this version cannot read.
    """
    if not jobs:
        return []
    parameters = {"worker": worker, "jobs": list(jobs), "first": min(jobs), "last": max(jobs)}
    document = conn.exec_driver_sql(_FETCH, parameters).scalar_one()
    return _assigned_decoder.decode(document)


def assigned(conn: Connection, worker: UUID) -> list[tuple[UUID, int]]:
    """(job, attempt) of every row assigned to `worker`: what the look for missed rows compares with its inbox."""
    rows = conn.execute(
        text("SELECT id, attempt FROM jobs WHERE worker_id = :worker AND state = 'leased'"),
        {"worker": worker},
    )
    return [(row.id, row.attempt) for row in rows]
