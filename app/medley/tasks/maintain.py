"""`medley.maintain`: forgets what no longer serves. Each part is a transaction of its own and may run at any time."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import Connection, Engine

from medley.db.connections import transaction
from medley.db.crashes import forget_crashes
from medley.db.demand import forget_empty
from medley.db.idempotency import forget_keys
from medley.db.workers import forget_gone
from medley.store import Store

DAY_S = 24 * 3600.0
CRASHES_S = 30 * DAY_S  # how long a death can be looked into
CHUNK = 10_000  # rows a transaction

log = structlog.get_logger()


def maintain(engine: Engine, store: Store) -> None:
    """Forgets what is older than a day (idempotency keys, gone workers, uploads that were cut off while they were
    stored), lanes in which nothing waits, and deaths older than `CRASHES_S`.
    """
    num_keys = _repeat(engine, lambda conn: forget_keys(conn, older_than_s=DAY_S, limit=CHUNK))
    num_lanes = _repeat(engine, lambda conn: forget_empty(conn, limit=CHUNK))
    num_crashes = _repeat(engine, lambda conn: forget_crashes(conn, older_than_s=CRASHES_S, limit=CHUNK))
    with transaction(engine) as conn:
        num_workers = forget_gone(conn, older_than_s=DAY_S)
    if num_keys or num_lanes or num_crashes or num_workers:
        log.info(
            "database.maintained",
            num_keys=num_keys,
            num_lanes=num_lanes,
            num_crashes=num_crashes,
            num_workers=num_workers,
        )
    if num_uploads := store.forget_unfinished(older_than_s=DAY_S):
        log.info("store.maintained", num_uploads=num_uploads)


def _repeat(engine: Engine, forget: Callable[[Connection], int]) -> int:
    total = 0
    while True:
        with transaction(engine) as conn:
            num_rows = forget(conn)
        total += num_rows
        if num_rows < CHUNK:
            return total
