"""Retention: how long a tenant's ended batches are kept, and how they go.

A batch is kept for its tenant's `retention_days` after its end, with its jobs, inputs, results and sweep; what has
not ended is kept. Past that time the API sees none of it (policies of migration 0005), and here it goes: jobs and the
batch by rows; inputs and results with the partition of their day where that goes within a day, else by rows too.

The one place where a table is registered: one that goes with its batch in `WITH_BATCH`, one whose rows age by
themselves in `AGING`, one that is kept in `KEPT`. A test holds that every tenant's table is in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db import partitions
from medley.db.connections import allow_minutes
from medley.spec.ids import oldest_after

MAX_DAYS = 3_650
LEFT_FOR = "1 day"  # inputs and results whose jobs are gone wait this long for their partition to be dropped


@dataclass(frozen=True)
class Goes:
    """A table whose rows go with a batch (`column` holds its id), or at an age (since the time in `column`)."""

    table: str
    column: str


# In the order in which they are deleted: what refers to another first. Jobs, inputs and results go before them.
WITH_BATCH = (
    Goes("batch_forecasts", "batch_id"),
    Goes("batch_lanes", "batch_id"),
    Goes("batch_failures", "batch_id"),
    Goes("webhooks", "batch_id"),
    Goes("sweep_parts", "sweep_id"),
    Goes("openai_batch_models", "batch_id"),
    Goes("openai_batches", "id"),
    Goes("sweep_columns", "sweep_id"),
    Goes("sweep_prompts", "sweep_id"),
    Goes("sweeps", "id"),
)
# Kept for the tenant's days from this time on.
AGING = (Goes("webhook_deliveries", "created_at"),)
# What is no record of work, or has a time of its own.
KEPT = {
    "tenants": "until the tenant is deleted",
    "api_keys": "until the tenant is deleted",
    "tenant_limits": "until the tenant is deleted",
    "tenant_usage": "one row a tenant",
    "usage": "until the tenant is deleted",
    "audit_log": "until the tenant is deleted",
    "adapter_grants": "until one of the two tenants is deleted",
    "adapters": "until the tenant is deleted",
    "adapter_revisions": "until the tenant is deleted",
    "files": "until they expire, at the latest after the tenant's days; they go with their bytes (`medley.db.files`)",
    "batches": "goes last, after all that names it",
    "jobs": "go by id, with their batch",
    "job_inputs": "in partitions",
    "job_results": "in partitions",
    "checkpoints": "of unfinished jobs alone; go with the job's end",
    "idempotency_keys": "a day",
    "demand_sums": "of waiting jobs alone",
    "demand_changes": "until the leader sums them up, half a minute later",
    "counter_sums": "one number a pool",
    "counter_changes": "until the leader sums them up, half a minute later",
    "crashes": "30 days",
}


def set_retention(conn: Connection, tenant: str, days: int) -> bool:
    """Sets a tenant's days, 1 to `MAX_DAYS`. False where there is no tenant of that name.

    Fewer days hide at once what is older; more bring back what has not gone yet.
    """
    statement = text("UPDATE tenants SET retention_days = :days WHERE name = :name RETURNING id")
    return conn.execute(statement, {"days": days, "name": tenant}).one_or_none() is not None


def read_retention(conn: Connection, tenant: UUID) -> int | None:
    """The tenant's days; None where it is gone."""
    statement = text("SELECT retention_days FROM tenants WHERE id = :id")
    days: int | None = conn.execute(statement, {"id": tenant}).scalar_one_or_none()
    return days


_EXPIRED = text(
    "SELECT b.id, b.total FROM tenants t CROSS JOIN LATERAL (SELECT b.id, b.total FROM batches b"
    "  WHERE b.tenant_id = t.id AND b.finished_at <= statement_timestamp() - make_interval(days => t.retention_days)"
    "  ORDER BY b.finished_at LIMIT :limit) b LIMIT :limit"
)


def read_expired(conn: Connection, limit: int) -> Sequence[Row[Any]]:
    """(id, total) of up to `limit` batches that are kept no longer."""
    return conn.execute(_EXPIRED, {"limit": limit}).all()


@dataclass(frozen=True)
class Slice:
    """Some jobs of an expired batch, in id order: how many they were, and the last."""

    num_jobs: int
    last: UUID | None


_FORGET_JOBS = """
WITH part AS (
    SELECT job_id FROM job_inputs WHERE batch_id = ANY(%(batches)b::uuid[]) AND job_id >= %(oldest)s
        AND job_id > %(after)s ORDER BY job_id LIMIT %(limit)s
), gone AS (
    DELETE FROM jobs WHERE id = ANY(ARRAY(SELECT job_id FROM part)) AND state NOT IN ('queued', 'leased') RETURNING id
), noted AS (
    INSERT INTO expired_jobs AS e (day, num_jobs)
    SELECT (uuid_extract_timestamp(id) AT TIME ZONE 'UTC')::date AS day, count(*) FROM gone GROUP BY 1 ORDER BY 1
    ON CONFLICT (day) DO UPDATE SET num_jobs = e.num_jobs + excluded.num_jobs
)
SELECT count(*) AS num_jobs, (array_agg(job_id ORDER BY job_id DESC))[1] AS last FROM part
"""


def forget_jobs(conn: Connection, batches: Sequence[UUID], *, after: UUID | None, limit: int) -> Slice:
    """Deletes up to `limit` ended jobs above `after` of these batches. Their inputs and results stay, unseen."""
    row = conn.exec_driver_sql(
        _FORGET_JOBS,
        {
            "batches": list(batches),
            "oldest": oldest_after(min(batches)),
            "after": after or UUID(int=0),
            "limit": limit,
        },
    ).one()
    return Slice(row.num_jobs, row.last)


def forget_batches(conn: Connection, batches: Sequence[UUID]) -> int:
    """Deletes ended batches whose jobs are gone, with all that goes with them. Returns how many."""
    allow_minutes(conn)
    ids = {"batches": list(batches)}
    for goes in WITH_BATCH:
        conn.execute(text(f"DELETE FROM {goes.table} WHERE {goes.column} = ANY(:batches)"), ids)
    statement = "DELETE FROM batches WHERE id = ANY(:batches) AND finished_at IS NOT NULL"
    return conn.execute(text(statement), ids).rowcount


def forget_aged(conn: Connection, limit: int) -> int:
    """Deletes up to `limit` rows of each of `AGING` that are older than their tenant keeps them. Returns the most."""
    counts = [
        conn.execute(
            text(
                f"DELETE FROM {goes.table} WHERE ctid = ANY(ARRAY(SELECT x.ctid FROM {goes.table} x JOIN tenants t"
                f" ON t.id = x.tenant_id AND x.{goes.column} <= statement_timestamp()"
                "  - make_interval(days => t.retention_days) LIMIT :limit))"
            ),
            {"limit": limit},
        ).rowcount
        for goes in AGING
    ]
    return max(counts, default=0)


@dataclass(frozen=True)
class Left:
    """A day whose partitions outlast some of its jobs: other tenants keep theirs, or a batch still runs."""

    day: date
    num_jobs: int


def read_left(conn: Connection) -> list[Left]:
    """The days whose inputs and results have waited `LEFT_FOR` for their partitions to be dropped."""
    rows = conn.execute(
        text(
            "SELECT day, num_jobs FROM expired_jobs"
            f" WHERE since <= statement_timestamp() - interval '{LEFT_FOR}' ORDER BY day"
        )
    )
    return [Left(row.day, row.num_jobs) for row in rows]


def forget_left(conn: Connection, left: Left, table: str, *, after: UUID | None, limit: int) -> Slice:
    """Of `limit` rows of that day above `after` in one of `partitions.TABLES`, deletes those whose jobs are gone."""
    row = conn.exec_driver_sql(
        f"""
WITH part AS (
    SELECT job_id FROM {table} WHERE job_id >= %(first)s AND job_id < %(past)s AND job_id > %(after)s
    ORDER BY job_id LIMIT %(limit)s
), gone AS (
    DELETE FROM {table} t WHERE t.job_id = ANY(ARRAY(SELECT job_id FROM part)) AND t.job_id >= %(first)s
        AND t.job_id < %(past)s AND NOT EXISTS (SELECT FROM jobs j WHERE j.id = t.job_id)
)
SELECT count(*) AS num_jobs, (array_agg(job_id ORDER BY job_id DESC))[1] AS last FROM part
""",
        {
            "first": partitions.first_of(left.day),
            "past": partitions.first_of(left.day + timedelta(days=1)),
            "after": after or UUID(int=0),
            "limit": limit,
        },
    ).one()
    return Slice(row.num_jobs, row.last)


def close_left(conn: Connection, left: Left) -> None:
    """The day has been gone through. Jobs of it that have expired meanwhile begin another wait."""
    parameters = {"day": left.day, "num_jobs": left.num_jobs}
    conn.execute(text("DELETE FROM expired_jobs WHERE day = :day AND num_jobs = :num_jobs"), parameters)
    conn.execute(text("UPDATE expired_jobs SET since = clock_timestamp() WHERE day = :day"), {"day": left.day})
