"""`medley.maintain`: forgets what no longer serves. Each part is a transaction of its own and may run at any time."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import Connection, Engine

from medley.db.connections import transaction
from medley.db.demand import forget_empty
from medley.db.idempotency import forget_keys
from medley.db.workers import forget_gone

DAY_S = 24 * 3600.0
CHUNK = 10_000  # rows a transaction

log = structlog.get_logger()


def maintain(engine: Engine) -> None:
    """Forgets idempotency keys and gone workers older than a day, and lanes in which nothing waits."""
    num_keys = _repeat(engine, lambda conn: forget_keys(conn, older_than_s=DAY_S, limit=CHUNK))
    num_lanes = _repeat(engine, lambda conn: forget_empty(conn, limit=CHUNK))
    with transaction(engine) as conn:
        num_workers = forget_gone(conn, older_than_s=DAY_S)
    if num_keys or num_lanes or num_workers:
        log.info("database.maintained", num_keys=num_keys, num_lanes=num_lanes, num_workers=num_workers)


def _repeat(engine: Engine, forget: Callable[[Connection], int]) -> int:
    total = 0
    while True:
        with transaction(engine) as conn:
            num_rows = forget(conn)
        total += num_rows
        if num_rows < CHUNK:
            return total
