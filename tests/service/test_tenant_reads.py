"""Reads in one round trip (`connections.read_as_tenant`): whose rows they see, and a connection after an error."""

from __future__ import annotations

from uuid import UUID

import pytest
from ledger import Ledger
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from medley.db.connections import read_as_tenant, tenant_transaction, transaction
from medley.db.results import read_jobs, read_jobs_as

MINE = "SELECT id FROM jobs WHERE id = ANY(%(ids)s)"


@pytest.fixture
def owned(ledger: Ledger) -> dict[UUID, UUID]:
    """A job of each of two tenants."""
    tenants = [ledger.add_tenant(), ledger.add_tenant()]
    owned = {}
    for tenant in tenants:
        batch = ledger.submit(tenant, [None])
        with tenant_transaction(ledger.api, tenant) as conn:
            owned[tenant] = conn.execute(text("SELECT id FROM jobs WHERE batch_id = :id"), {"id": batch}).scalar_one()
    return owned


def test_a_tenant_reads_its_rows_and_nobody_elses(ledger: Ledger, owned: dict[UUID, UUID]) -> None:
    for tenant, job in owned.items():
        rows = read_as_tenant(ledger.api, tenant, MINE, {"ids": list(owned.values())})
        assert [row.id for row in rows] == [job]


def test_the_tenant_is_forgotten_with_the_transaction(ledger: Ledger, owned: dict[UUID, UUID]) -> None:
    (tenant, _), *_ = owned.items()
    read_as_tenant(ledger.api, tenant, MINE, {"ids": list(owned.values())})
    with transaction(ledger.api) as conn:
        assert not conn.execute(text("SELECT count(*) FROM jobs")).scalar_one()


def test_jobs_read_so_are_those_of_a_transaction(ledger: Ledger, owned: dict[UUID, UUID]) -> None:
    for tenant, job in owned.items():
        (row,) = read_jobs_as(ledger.api, tenant, list(owned.values()))
        with tenant_transaction(ledger.api, tenant) as conn:
            (wanted,) = read_jobs(conn, [job])
        assert row._asdict() == wanted._asdict()
    assert read_jobs_as(ledger.api, tenant, []) == []


def test_after_an_error_the_connection_serves_on(ledger: Ledger, owned: dict[UUID, UUID]) -> None:
    (tenant, job), *_ = owned.items()
    for _ in range(20):  # more than the pool has connections
        with pytest.raises(DBAPIError) as raised:
            read_as_tenant(
                ledger.api,
                tenant,
                "SELECT 1 / %(secret)s::int WHERE %(other)s = 'prompt'",
                {"secret": 0, "other": "prompt"},
            )
        assert not raised.value.connection_invalidated
    assert [row.id for row in read_as_tenant(ledger.api, tenant, MINE, {"ids": [job]})] == [job]


def test_a_connection_that_is_cut_in_mid_read_is_replaced(ledger: Ledger, owned: dict[UUID, UUID]) -> None:
    (tenant, job), *_ = owned.items()
    with pytest.raises(OperationalError) as raised:
        read_as_tenant(ledger.api, tenant, "SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)", {})
    assert raised.value.connection_invalidated
    assert [row.id for row in read_as_tenant(ledger.api, tenant, MINE, {"ids": [job]})] == [job]
