"""The plans of statements that run all day: none reads a whole table, however full the queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from ledger import Ledger
from sqlalchemy import text

from medley.db import batches, chores, crashes, queue

NUM_LANES = 20


@pytest.fixture
def lanes(ledger: Ledger) -> list[UUID]:
    """The lanes of a full queue, whose deadlines are far, with fresh statistics."""
    tenant = ledger.add_tenant()
    revisions = [ledger.add_revision(tenant, f"adapter{i}") for i in range(NUM_LANES)]
    ledger.submit(tenant, revisions * 500, deadline_at=datetime.now(UTC) + timedelta(days=1))
    ledger.analyze()
    return revisions


def test_a_full_queue_is_claimed_from_and_looked_at_by_index(ledger: Ledger, lanes: list[UUID]) -> None:
    holders = [ledger.start_worker() for _ in range(10)]
    wants = [queue.Want(w, lane, batches.NORMAL, 3) for lane in lanes for w in holders[::3]]
    claim = queue._parameters(ledger.pool, wants, {})
    at_stake = {"jobs": [], "limit": 1}
    due = {"pool": ledger.pool, "tenants": [], "revisions": [], "lapsed_since": 0.0}
    with ledger.working() as conn:
        plans = [
            conn.exec_driver_sql("EXPLAIN " + queue._CLAIM, claim).scalars().all(),
            conn.execute(text("EXPLAIN " + chores._DUE.text), due).scalars().all(),
            conn.execute(text("EXPLAIN " + crashes._AT_STAKE.text), at_stake).scalars().all(),
        ]
    for plan in plans:
        assert not [line for line in plan if "Seq Scan on jobs" in line]
    assert sum("Index Cond: (deadline_at <= " in line for line in plans[1]) == 1
