"""The audit of a database in which nothing is left to do: every job has one result, every count equals a recount.

Knows the tables and nothing of what was run. Scenarios of faults and the fleet benchmark end with it.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

_AUDIT = {
    "jobs that have not ended": "SELECT count(*) FROM jobs WHERE state IN ('queued', 'leased')",
    "ended jobs without their one result": (
        "SELECT count(*) FROM jobs j LEFT JOIN job_results r ON r.job_id = j.id"
        " WHERE r.job_id IS NULL OR r.state <> j.state"
    ),
    "batches whose counts differ from a recount": (
        "SELECT count(*) FROM batches b JOIN LATERAL ("
        "  SELECT count(*) AS total, count(*) FILTER (WHERE state = 'succeeded') AS succeeded,"
        "   count(*) FILTER (WHERE state = 'failed') AS failed,"
        "   count(*) FILTER (WHERE state = 'cancelled') AS cancelled,"
        "   count(*) FILTER (WHERE state = 'expired') AS expired FROM jobs j WHERE j.batch_id = b.id"
        "   AND NOT EXISTS (SELECT FROM job_results r WHERE r.job_id = j.id AND r.retried_by IS NOT NULL)) c ON true"
        " WHERE (b.total, b.succeeded, b.failed, b.cancelled, b.expired)"
        "  IS DISTINCT FROM (c.total, c.succeeded, c.failed, c.cancelled, c.expired)"
    ),
    "batches whose usage differs from a recount": (
        "SELECT count(*) FROM batches b JOIN LATERAL ("
        "  SELECT coalesce(sum(r.prompt_tokens), 0) AS prompt, coalesce(sum(r.completion_tokens), 0) AS completion,"
        "   coalesce(sum(cardinality(r.token_ids)), 0) AS tokens FROM job_results r WHERE r.batch_id = b.id) u ON true"
        " WHERE b.prompt_tokens <> u.prompt OR b.completion_tokens <> u.completion OR u.completion <> u.tokens"
    ),
    "lanes whose counts differ from a recount": (
        "SELECT count(*) FROM batch_lanes l FULL JOIN ("
        "  SELECT j.batch_id, coalesce(j.revision_id, j.tenant_id) AS lane,"
        "   count(*) FILTER (WHERE r.retried_by IS NULL) AS total,"
        "   count(*) FILTER (WHERE r.retried_by IS NULL AND r.state = 'succeeded') AS succeeded,"
        "   count(*) FILTER (WHERE r.retried_by IS NULL AND r.state = 'failed') AS failed,"
        "   count(*) FILTER (WHERE r.retried_by IS NULL AND r.state = 'cancelled') AS cancelled,"
        "   count(*) FILTER (WHERE r.retried_by IS NULL AND r.state = 'expired') AS expired,"
        "   coalesce(sum(r.prompt_tokens), 0) AS prompt, coalesce(sum(r.completion_tokens), 0) AS completion"
        "  FROM jobs j LEFT JOIN job_results r ON r.job_id = j.id GROUP BY 1, 2) c"
        "  ON c.batch_id = l.batch_id AND c.lane = coalesce(l.revision_id, l.tenant_id)"
        " WHERE (l.total, l.succeeded, l.failed, l.cancelled, l.expired, l.prompt_tokens, l.completion_tokens)"
        "  IS DISTINCT FROM (c.total, c.succeeded, c.failed, c.cancelled, c.expired, c.prompt, c.completion)"
    ),
    "failures by code that differ from a recount": (
        "SELECT count(*) FROM (SELECT *, coalesce(revision_id, tenant_id) AS lane FROM batch_failures"
        "  WHERE num_jobs > 0) f FULL JOIN ("
        "  SELECT j.batch_id, coalesce(j.revision_id, j.tenant_id) AS lane, coalesce(r.error_code, 'unknown') AS code,"
        "   count(*) AS num_jobs"
        "  FROM jobs j JOIN job_results r ON r.job_id = j.id AND r.state = 'failed' AND r.retried_by IS NULL"
        "  GROUP BY 1, 2, 3) c USING (batch_id, lane, code) WHERE f.num_jobs IS DISTINCT FROM c.num_jobs"
    ),
    "usage that differs from a recount": (
        "SELECT count(*) FROM (SELECT *, coalesce(revision_id, tenant_id) AS lane FROM usage) u FULL JOIN ("
        "  SELECT j.tenant_id, (j.finished_at AT TIME ZONE 'UTC')::date AS day,"
        "   coalesce(j.revision_id, j.tenant_id) AS lane, count(*) AS num_jobs,"
        "   sum(r.prompt_tokens) AS prompt, sum(r.completion_tokens) AS completion"
        "  FROM jobs j JOIN job_results r ON r.job_id = j.id AND r.worker_id IS NOT NULL GROUP BY 1, 2, 3) c"
        "  USING (tenant_id, day, lane) WHERE (u.num_jobs, u.prompt_tokens, u.completion_tokens)"
        "  IS DISTINCT FROM (c.num_jobs, c.prompt, c.completion)"
    ),
    "results that two retries supersede, or none that is there": (
        "SELECT count(*) FROM job_results r LEFT JOIN job_inputs i ON i.job_id = r.retried_by"
        " WHERE r.retried_by IS NOT NULL AND i.retry_of IS DISTINCT FROM r.job_id"
    ),
    "retries beside what batches say": (
        "SELECT count(*) FROM batches b WHERE b.retried <> (SELECT count(*) FROM job_inputs i"
        "  WHERE i.batch_id = b.id AND i.retry_of IS NOT NULL)"
    ),
    "result numbers over the batch's last": (
        "SELECT count(*) FROM job_results r JOIN batches b ON b.id = r.batch_id WHERE r.seq > b.last_seq OR r.seq < 1"
    ),
    "batches that ended and do not say so": "SELECT count(*) FROM batches WHERE finished_at IS NULL",
    "demand that nothing waits for": "SELECT count(*) FROM demand WHERE num_queued <> 0",
    "usage of the queue's quotas that nothing accounts for": (
        "SELECT count(*) FROM tenant_usage WHERE queued_jobs <> 0 OR queued_bytes <> 0"
    ),
    "checkpoints that nothing will read": "SELECT count(*) FROM checkpoints",
}


def faults(conn: Connection) -> dict[str, int]:
    """What differs, by how many rows; {} where every job has exactly one result and all counts are right."""
    found = {what: int(conn.execute(text(sql)).scalar_one()) for what, sql in _AUDIT.items()}
    return {what: count for what, count in found.items() if count}


def audit(conn: Connection) -> None:
    """Raises AssertionError with what differs."""
    found = faults(conn)
    if found:
        raise AssertionError(found)
