"""Rows of days past: jobs whose ids and ends are as old as a test wants them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from unittest import mock
from uuid import UUID

from ledger import Ledger
from sqlalchemy import text

from medley.db import partitions
from medley.spec import ids


def day_before(days: float) -> date:
    return (datetime.now(UTC) - timedelta(days=days)).date()


@contextmanager
def days_ago(days: float) -> Iterator[None]:
    """Ids that are made within the block are this old."""
    now_ns = time.time_ns() - int(days * 86_400e9)
    with mock.patch.object(ids, "_last", 0), mock.patch.object(ids.time, "time_ns", return_value=now_ns):
        yield


def make_partitions(ledger: Ledger) -> int:
    """Makes what is missing, as the chore does. Returns how many partitions."""
    num_made = 0
    for table in partitions.TABLES:
        with ledger.working() as conn:
            num_made += partitions.make(conn, table)
    return num_made


def submit_aged(ledger: Ledger, tenant: UUID, days: float, revisions: Sequence[UUID | None] = (None,)) -> UUID:
    with days_ago(days):
        return ledger.submit(tenant, revisions)


def end_aged(ledger: Ledger, batch: UUID, days: float) -> None:
    """The batch's jobs succeed, as many days ago."""
    ledger.has_aged = True
    worker = ledger.start_worker()
    lanes = {row.lane for row in ledger.jobs().values() if row.batch_id == batch}
    for lane in lanes:
        held = ledger.claim(worker, [(lane, 1_000)])
        ledger.complete(worker, [(c.job, c.attempt) for c in held], text="an answer")
    with ledger.working() as conn:
        for statement in (
            "UPDATE jobs SET finished_at = clock_timestamp() - make_interval(secs => :age) WHERE batch_id = :id",
            "UPDATE batches SET finished_at = clock_timestamp() - make_interval(secs => :age) WHERE id = :id",
        ):
            conn.execute(text(statement), {"id": batch, "age": days * 86_400})


def run_aged(ledger: Ledger, tenant: UUID, days: float, revisions: Sequence[UUID | None] = (None,)) -> UUID:
    """A batch that was made and ended as many days ago."""
    batch = submit_aged(ledger, tenant, days, revisions)
    end_aged(ledger, batch, days)
    return batch
