"""What a worker reads of the jobs assigned to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
from sqlalchemy import Connection, text

from medley.spec.jobs import Checkpoint
from medley.spec.sampling import SamplingParams


@dataclass(frozen=True)
class Assigned:
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


_FETCH = """
SELECT j.id, j.attempt, j.tenant_id, j.revision_id, a.digest, j.priority, j.step_limit, i.seed,
    a.quarantined_at IS NOT NULL AS is_quarantined,
    coalesce(i.prompt, p.prompt) AS prompt, coalesce(i.prompt_token_ids, p.prompt_token_ids) AS token_ids,
    coalesce(i.sampling, s.sampling)::text AS sampling, c.token_ids AS kept_ids, c.logprobs AS kept_logprobs
FROM jobs j JOIN job_inputs i ON i.job_id = j.id
LEFT JOIN sweep_prompts p ON p.sweep_id = j.batch_id AND p.prompt_idx = i.prompt_idx
LEFT JOIN sweeps s ON i.sampling IS NULL AND s.id = j.batch_id
LEFT JOIN adapter_revisions a ON a.id = j.revision_id
LEFT JOIN checkpoints c ON c.job_id = j.id
WHERE coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false) AND j.id = ANY(%(jobs)b::uuid[])
ORDER BY j.priority DESC, j.leased_at, j.id
"""


def fetch_inputs(conn: Connection, worker: UUID, jobs: Sequence[UUID]) -> list[Assigned]:
    """The inputs of those of `jobs` that are assigned to `worker` now, in one query; the rest is left out."""
    found: list[Assigned] = []
    known: dict[str, SamplingParams] = {}  # most jobs of a batch share theirs
    # Unpacked by position, in the order of _FETCH: by name costs more than the query.
    for (
        job,
        attempt,
        tenant,
        revision,
        digest,
        priority,
        step_limit,
        seed,
        is_quarantined,
        prompt,
        token_ids,
        raw_sampling,
        kept_ids,
        kept_logprobs,
    ) in conn.exec_driver_sql(_FETCH, {"worker": worker, "jobs": list(jobs)}):
        sampling = known.get(raw_sampling)
        if sampling is None:
            sampling = known[raw_sampling] = msgspec.json.decode(raw_sampling, type=SamplingParams)
        found.append(
            Assigned(
                job=job,
                attempt=attempt,
                tenant=tenant,
                revision=revision,
                digest=digest,
                prompt=prompt,
                prompt_token_ids=None if token_ids is None else tuple(token_ids),
                sampling=msgspec.structs.replace(sampling, seed=seed),
                checkpoint=None
                if kept_ids is None
                else Checkpoint(token_ids=tuple(kept_ids), logprobs=tuple(kept_logprobs)),
                priority=priority,
                step_limit=step_limit,
                is_quarantined=is_quarantined,
            )
        )
    return found


def assigned(conn: Connection, worker: UUID) -> list[tuple[UUID, int]]:
    """(job, attempt) of every row assigned to `worker`: what the look for missed rows compares with its inbox."""
    rows = conn.execute(
        text("SELECT id, attempt FROM jobs WHERE worker_id = :worker AND state = 'leased'"),
        {"worker": worker},
    )
    return [(row.id, row.attempt) for row in rows]
