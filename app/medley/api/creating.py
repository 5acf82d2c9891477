"""Creates of jobs: one transaction that claims the key, writes batch and jobs, and last what shadows the queue.

Knows bodies and rows; the shape of the request (one job, an array, a file of lines) is its callers'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection

from medley.api.errors import InvalidRequest
from medley.api.idempotency import Create
from medley.api.job_columns import JobReader
from medley.db.batches import NewBatch, close_batch, open_batch
from medley.db.new_jobs import JobColumns, add_batch_demand, append_columns
from medley.db.quotas import check_queue_room, reserve
from medley.db.results import read_job_ids
from medley.db.tenants import Tenant
from medley.spec.errors import Fault
from medley.spec.ids import uuid7

MAX_LISTED_IDS = 10_000  # job ids in the answer to a create; larger batches are joined by custom_id


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    name: str | None
    priority: int
    deadline_at: datetime | None
    is_single: bool = False  # a job by itself, not a batch of one


@dataclass(frozen=True)
class Created:
    """`job_ids` in the order sent; None where there are more than `MAX_LISTED_IDS`."""

    batch: UUID
    job_ids: list[UUID] | None
    is_replay: bool


def create_jobs(
    conn: Connection,
    tenant: Tenant,
    pool: str,
    create: Create,
    options: BatchOptions,
    reader: JobReader,
    chunks: Iterable[list[JobColumns]],
    *,
    num_sent: int = 0,
) -> Created:
    """Writes the batch that `chunks` hold, or finds the one that this request has made.

    num_sent: how many jobs there are, where that is known before they are read.
    Raises InvalidRequest with the faults of every job, KeyConflict and QuotaExceeded; then nothing of the transaction
    may stand.
    """
    batch = NewBatch(
        uuid7(), tenant.id, pool, options.name, options.priority, options.deadline_at, is_single=options.is_single
    )
    existing = create.claim(conn, tenant.id, batch.id)
    if existing is not None:
        ids = read_job_ids(conn, existing, MAX_LISTED_IDS + 1)
        return Created(existing, ids if len(ids) <= MAX_LISTED_IDS else None, is_replay=True)
    if num_sent == 0:
        # A queue that is full is not first given a million rows to refuse.
        check_queue_room(conn, tenant.id, tenant.quotas, num_jobs=1)
    if not reader.faults:  # a batch with a fault may not even be storable
        open_batch(conn, batch, total=num_sent)
    ids = []
    for columns in (part for chunk in chunks for part in chunk):
        # After the first fault the rest is only judged.
        if not reader.faults:
            written = append_columns(conn, batch, columns)
            if len(ids) <= MAX_LISTED_IDS:
                ids += written
    if reader.num_jobs == 0 and not reader.faults:
        raise InvalidRequest.of([Fault(field="jobs", got="no job", wanted="at least one")])
    reader.faults.raise_any()
    if reader.num_jobs != num_sent:
        close_batch(conn, batch.id, reader.num_jobs)
    add_batch_demand(conn, batch, reader.lanes)
    reserve(conn, tenant.id, tenant.quotas, batch.id, num_jobs=reader.num_jobs, num_bytes=reader.num_bytes)
    return Created(batch.id, ids if reader.num_jobs <= MAX_LISTED_IDS else None, is_replay=False)
