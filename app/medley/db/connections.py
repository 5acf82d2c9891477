"""Engines and transactions: the one place that opens connections to PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

STATEMENT_TIMEOUT_MS = 60_000  # no statement of the service needs a minute; a million-row insert comes in parts
LOCK_TIMEOUT_MS = 20_000
IDLE_IN_TRANSACTION_MS = 30_000  # a frozen process must not hold its locks for ever
CONNECT_TIMEOUT_S = 5
PING_AFTER_S = 0.1  # no server is back sooner


def make_engine(
    url: str,
    *,
    name: str,
    pool_size: int = 5,
    pool_timeout_s: float = 30,
    lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    idle_in_transaction_ms: int = IDLE_IN_TRANSACTION_MS,
) -> Engine:
    """An engine of `pool_size` connections at the most; `name` shows in pg_stat_activity."""
    options = (
        f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={lock_timeout_ms}"
        f" -c idle_in_transaction_session_timeout={idle_in_transaction_ms} -c timezone=UTC -c jit=off"
        # A job's row leaves three indexes on its way. A plain index scan forgets the entries of rows that are gone, a
        # bitmap scan reads them again each time until the next vacuum (3,000 held jobs in 99 ms, 4,600 in 34).
        " -c enable_bitmapscan=off"
    )
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_timeout_s,
        hide_parameters=True,  # an error's text goes to the log, and parameters hold prompts
        connect_args={
            "application_name": f"medley-{name}",
            "options": options,
            "connect_timeout": CONNECT_TIMEOUT_S,
            # A cut network shows as an error within ~10 s rather than as a read that never returns: the first three
            # are for a connection that waits for an answer, the last for one whose question did not get through.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
    _ping_what_was_idle(engine)
    return engine


def _ping_what_was_idle(engine: Engine) -> None:
    """Asks a connection that was idle whether it still stands before a transaction begins, else connects anew.

    SQLAlchemy's own option asks each time: one of five round trips of a short transaction.
    """

    @event.listens_for(engine, "checkin")
    def note(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info["idle_since_s"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection) -> None:
        idle_since_s = record.info.get("idle_since_s")
        if idle_since_s is None or time.monotonic() - idle_since_s < PING_AFTER_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error


def allow_minutes(conn: Connection) -> None:
    """Lets the rest of this transaction take its time: a whole batch, up to a million jobs, is one statement."""
    conn.execute(text("SET LOCAL statement_timeout = '10min'"))
    plan_anew(conn)


def plan_anew(conn: Connection) -> None:
    """Has the rest of this transaction planned for the values that it names, as for statements whose size varies."""
    conn.execute(text("SET LOCAL plan_cache_mode = auto"))


def plan_each(conn: Connection) -> None:
    """Has each statement of the rest of this transaction planned when it runs, for tables whose size varies: a plan
    that was made while one was small would read the whole of it for as long as the session lasts."""
    conn.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction, committed at the end of the block and rolled back by an exception."""
    with engine.begin() as connection:
        yield connection


_BIND = "SELECT set_config('medley.tenant', %(tenant)s, true), set_config('plan_cache_mode', %(mode)s, true)"


@contextmanager
def tenant_transaction(engine: Engine, tenant: UUID, *, keeps_plans: bool = False) -> Iterator[Connection]:
    """One transaction that sees and writes the rows of `tenant` alone (row-level security).

    keeps_plans: for short statements that come again and again. Over partitions PostgreSQL would plan them each time,
    which takes longer than to run them (measured: 0.7 ms instead of 0.3 to read a job); they are pruned as they run.
    """
    mode = "force_generic_plan" if keeps_plans else "auto"
    with engine.begin() as connection:
        connection.exec_driver_sql(_BIND, {"tenant": str(tenant), "mode": mode})
        yield connection


def read_as_tenant(engine: Engine, tenant: UUID, statement: str, parameters: Mapping[str, object]) -> list[Any]:
    """The rows of one statement that reads `tenant`'s rows alone, by name; as `tenant_transaction` that keeps plans.

    All of the transaction goes out together and comes back together (libpq's pipeline): one round trip in place of
    four. statement: as psycopg takes it, with %(name)s. Raises DBAPIError.
    """
    with engine.connect() as connection:
        driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
        try:
            with driver.cursor(row_factory=namedtuple_row) as cursor:
                with driver.pipeline():
                    driver.execute(_BIND, {"tenant": str(tenant), "mode": "force_generic_plan"})
                    cursor.execute(statement, parameters)
                    driver.commit()
                return cursor.fetchall()
        except psycopg.Error as error:
            is_broken = driver.broken or driver.closed
            if is_broken:
                connection.invalidate(error)
            else:
                driver.rollback()
            raise DBAPIError.instance(
                statement, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=is_broken
            ) from error


def violated_constraint(error: IntegrityError) -> str | None:
    """The constraint's name, where the database tells it."""
    return error.orig.diag.constraint_name if isinstance(error.orig, psycopg.Error) else None


def is_tenant_gone(error: IntegrityError) -> bool:
    """Whether a row was refused because its tenant's is not there any more."""
    diagnosis = error.orig.diag if isinstance(error.orig, psycopg.Error) else None
    return diagnosis is not None and diagnosis.constraint_name == f"{diagnosis.table_name}_tenant_id_fkey"
