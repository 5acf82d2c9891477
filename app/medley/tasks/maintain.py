"""`medley.maintain`: forgets what no longer serves. Each part is a transaction of its own and may run at any time."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import Connection, Engine

from medley.db.adapters import await_backups, forget_digest, read_dead_digests
from medley.db.connections import transaction
from medley.db.crashes import forget_crashes
from medley.db.demand import forget_empty
from medley.db.files import forget_files, read_unwanted
from medley.db.idempotency import forget_keys
from medley.db.leaders import forget_leaders
from medley.db.workers import forget_gone
from medley.objects import Objects
from medley.store import Store
from medley.tasks.erase import end_tenants, stop_closed
from medley.tasks.retention import keep_retention

DAY_S = 24 * 3600.0
CRASHES_S = 30 * DAY_S  # how long a death can be looked into
LEADERS_S = 30 * DAY_S  # a pool without a dispatcher for as long is no more
CHUNK = 10_000  # rows a transaction
# A remote store takes some hundredths of a second for each object.
ADAPTERS = 200  # whose files one run deletes
FILES = 200  # a transaction

log = structlog.get_logger()


def maintain(engine: Engine, store: Store) -> None:
    """Forgets what is older than a day (idempotency keys, gone workers, uploads that were cut off while they were
    stored), lanes in which nothing waits, deaths and terms older than `CRASHES_S` and `LEADERS_S`, adapters' files that
    no adapter has any more, tenants' files that are deleted or expired, what tenants keep no longer, and tenants that
    are to be deleted.
    """
    stop_closed(engine)
    num_keys = _repeat(engine, lambda conn: forget_keys(conn, older_than_s=DAY_S, limit=CHUNK))
    num_lanes = _repeat(engine, lambda conn: forget_empty(conn, limit=CHUNK))
    num_crashes = _repeat(engine, lambda conn: forget_crashes(conn, older_than_s=CRASHES_S, limit=CHUNK))
    with transaction(engine) as conn:
        num_workers = forget_gone(conn, older_than_s=DAY_S)
        forget_leaders(conn, older_than_s=LEADERS_S)
    if num_keys or num_lanes or num_crashes or num_workers:
        log.info(
            "database.maintained",
            num_keys=num_keys,
            num_lanes=num_lanes,
            num_crashes=num_crashes,
            num_workers=num_workers,
        )
    if num_adapters := _forget_adapters(engine, store):
        log.info("adapters.forgotten", num_adapters=num_adapters)
    if num_files := _repeat(engine, lambda conn: _forget_files(conn, store.objects), chunk=FILES):
        log.info("files.forgotten", num_files=num_files)
    gone = keep_retention(engine)
    if gone.num_batches or gone.partitions or gone.num_days_by_rows:
        log.info(
            "retention.kept",
            num_batches=gone.num_batches,
            num_jobs=gone.num_jobs,
            num_days_by_rows=gone.num_days_by_rows,
            partitions=gone.partitions,
        )
    if num_uploads := store.forget_unfinished(older_than_s=DAY_S):
        log.info("store.maintained", num_uploads=num_uploads)
    end_tenants(engine, store)


def _forget_files(conn: Connection, objects: Objects) -> int:
    """The bytes first: a row without them is found again, bytes without a row never would be."""
    await_backups(conn)
    found = read_unwanted(conn, unstored_after_s=DAY_S, limit=FILES)
    for row in found:
        objects.delete(row.object_key)
    forget_files(conn, [row.id for row in found])
    return len(found)


def _forget_adapters(engine: Engine, store: Store) -> int:
    """Deletes the files of deleted adapters once nothing uses them. Returns of how many."""
    with transaction(engine) as conn:
        digests = read_dead_digests(conn, limit=ADAPTERS)
    num_deleted = 0
    for digest in digests:
        with transaction(engine) as conn:
            if forget_digest(conn, digest):
                store.delete(digest)
                num_deleted += 1
    return num_deleted


def _repeat(engine: Engine, forget: Callable[[Connection], int], *, chunk: int = CHUNK) -> int:
    total = 0
    while True:
        with transaction(engine) as conn:
            num_rows = forget(conn)
        total += num_rows
        if num_rows < chunk:
            return total
