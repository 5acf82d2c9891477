"""The part of `medley.maintain` that ends tenants: stops what a closed one runs, and erases it when it is due.

`medley tenants delete` runs the same steps at once. Both may run, and either may be killed: each step is a transaction.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from medley.db import erasure
from medley.db.adapters import await_backups, hold_digest, is_digest_used
from medley.db.cancels import read_cancelling
from medley.db.connections import transaction, violated_constraint
from medley.db.erasure import Certificate
from medley.db.files import object_prefix
from medley.store import Store
from medley.tasks.cancel import end_queue

CHUNK = 5_000  # jobs a transaction
BATCHES = 500
ROUNDS = 10  # what was being committed while the tenant was closed is met in the second

log = structlog.get_logger()


def stop_closed(engine: Engine) -> None:
    """Cancels what closed tenants have, before anything that takes long."""
    with transaction(engine) as conn:
        closing = erasure.read_closing(conn)
    for tenant in closing:
        stop(engine, tenant.tenant)


def end_tenants(engine: Engine, store: Store) -> None:
    """One look: stops every closed tenant's work, erases those that are due and have nothing running."""
    with transaction(engine) as conn:
        closing = erasure.read_closing(conn)
        unfinished = set(erasure.read_unfinished(conn))
    for tenant in closing:
        num_running = stop(engine, tenant.tenant)
        if tenant.is_due and not num_running:
            unfinished.add(tenant.tenant)
        else:
            unfinished.discard(tenant.tenant)
    for tenant_id in unfinished:
        certificate = erase(engine, store, tenant_id)
        if certificate is not None:
            log.info("tenant.erased", tenant=tenant_id.hex, num_rows=sum(certificate.num_rows.values()))


def stop(engine: Engine, tenant: UUID) -> int:
    """Cancels all that the tenant has. Returns how many of its jobs are still at workers, which abort them."""
    num_stopped = BATCHES
    while num_stopped:
        with transaction(engine) as conn:
            num_stopped = erasure.stop_batches(conn, tenant, BATCHES)
    with transaction(engine) as conn:
        cancelling = read_cancelling(conn, tenant=tenant)
    for batch in cancelling:
        end_queue(engine, batch)
    with transaction(engine) as conn:
        return erasure.num_leased(conn, tenant)


def erase(engine: Engine, store: Store, tenant: UUID) -> Certificate | None:
    """Erases the tenant whose time has come, rows first and files after. None where it is not to be erased now.

    Raises erasure.NotErasable for a table that it cannot judge, before anything is erased, and where rows of others
    need what is to go.
    """
    with transaction(engine) as conn:
        tables = erasure.read_tables(conn)
        if not erasure.begin(conn, tenant):
            return None
    for is_last in [False] * (ROUNDS - 1) + [True]:
        if _erase_rows(engine, tenant, tables, is_last=is_last):
            break
    _delete_files(engine, store, tenant)
    with transaction(engine) as conn:
        return erasure.finish(conn, tenant)


def _erase_rows(engine: Engine, tenant: UUID, tables: list[erasure.TenantTable], *, is_last: bool) -> bool:
    """Goes through all tables. False where something was committed meanwhile that is the tenant's."""
    with transaction(engine) as conn:
        if not erasure.is_there(conn, tenant):
            return True
        batches = erasure.read_batches(conn, tenant, after=None, limit=BATCHES)
    while batches:
        num_jobs = CHUNK
        while num_jobs:
            with transaction(engine) as conn:
                num_jobs = erasure.erase_jobs(conn, tenant, batches, CHUNK)
        with transaction(engine) as conn:
            batches = erasure.read_batches(conn, tenant, after=batches[-1], limit=BATCHES)
    try:
        for table in tables:
            with transaction(engine) as conn:
                if not erasure.is_there(conn, tenant):
                    return True  # another process has come to the end of it
                erasure.erase_table(conn, tenant, table)
    except IntegrityError as error:
        if is_last:
            constraint = violated_constraint(error)
            raise erasure.NotErasable(f"rows under the constraint {constraint} still need the tenant's") from error
        return False
    return True


def _delete_files(engine: Engine, store: Store, tenant: UUID) -> None:
    with transaction(engine) as conn:
        digests = erasure.read_digests(conn, tenant)
    for digest in digests:
        with transaction(engine) as conn:
            # Who uploads the same files holds this lock until the row that uses them is committed.
            hold_digest(conn, digest, exclusive=True)
            is_shared = is_digest_used(conn, digest)
            if not is_shared:
                store.delete(digest)
            erasure.note_files(conn, tenant, digest, is_shared=is_shared)
    for key in list(store.objects.keys(object_prefix(tenant))):
        with transaction(engine) as conn:
            await_backups(conn)
            store.objects.delete(key)
