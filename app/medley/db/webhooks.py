"""Webhooks: endpoints that a tenant has registered, and the deliveries on their way to them.

An event is written in the transaction that makes it true, as one delivery row for each endpoint that wants it. The
row holds its state and due time; an attempt leases it, so two deliverers never send at once, and one that dies in the
middle is followed by another once the lease has lapsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

LEASE_S = 60.0  # an attempt takes seconds; who has not noted its end by then has died
RINGS = 100  # messages a tick

# Part of the statement that counts ends (`medley.db.ends`): `counted` are the batches as they stand now, each with
# how many of its jobs have failed in this statement. A job by itself is no event. An OpenAI batch has finished once its
# files are there.
NOTIFY_COUNTED = """
    INSERT INTO webhook_deliveries (tenant_id, webhook_id, event, payload)
    SELECT c.tenant_id, w.id, e.event, json_build_object('type', e.event, 'timestamp', clock_timestamp(), 'data',
        json_build_object(
            'id', CASE WHEN s.id IS NULL THEN 'batch_' ELSE 'sweep_' END || replace(c.id::text, '-', ''),
            'object', CASE WHEN s.id IS NULL THEN 'batch' ELSE 'sweep' END,
            'name', coalesce(s.name, c.name), 'created_at', c.created_at, 'finished_at', c.finished_at,
            'counts', json_build_object('total', c.total,
                'queued_or_running', c.total - c.succeeded - c.failed - c.cancelled - c.expired,
                'succeeded', c.succeeded, 'failed', c.failed, 'cancelled', c.cancelled, 'expired', c.expired,
                'retried', c.retried),
            'usage', json_build_object('prompt_tokens', c.prompt_tokens, 'completion_tokens', c.completion_tokens)
        ))::text
    FROM counted c
    CROSS JOIN LATERAL (
        SELECT * FROM webhooks WHERE tenant_id = c.tenant_id AND batch_id IS NULL AND disabled_at IS NULL
        UNION ALL SELECT * FROM webhooks WHERE batch_id = c.id AND disabled_at IS NULL
    ) w
    LEFT JOIN sweeps s ON s.id = c.id
    CROSS JOIN LATERAL (VALUES
        (CASE WHEN c.finished_at IS NULL OR EXISTS (
            SELECT FROM openai_batches o WHERE o.id = c.id AND o.ended_at IS NULL) THEN NULL
            WHEN s.id IS NULL THEN 'batch.finished' ELSE 'sweep.finished' END),
        (CASE WHEN w.failed_jobs > c.failed - c.failed_now AND w.failed_jobs <= c.failed THEN 'batch.failing' END)
    ) e(event)
    WHERE NOT c.is_single AND e.event = ANY(w.events)
"""

_NOTIFY_FINISHED = text(
    "WITH counted AS (SELECT b.*, 0 AS failed_now FROM batches b"
    f" WHERE b.id = :batch AND b.finished_at IS NOT NULL) {NOTIFY_COUNTED}"
    " AND (CAST(:webhook AS uuid) IS NULL OR w.id = CAST(:webhook AS uuid))"
)

_NOTIFY_QUARANTINE = text(
    "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event, payload)"
    " SELECT r.tenant_id, w.id, 'adapter.quarantined', json_build_object('type', 'adapter.quarantined',"
    "  'timestamp', clock_timestamp(), 'data', json_build_object('object', 'adapter', 'name', a.name,"
    "  'revision', 'rev_' || replace(r.id::text, '-', ''), 'digest', r.digest,"
    "  'quarantined_at', r.quarantined_at))::text"
    " FROM adapter_revisions r JOIN adapters a ON a.id = r.adapter_id JOIN webhooks w ON w.tenant_id = r.tenant_id"
    "  AND w.disabled_at IS NULL AND w.batch_id IS NULL AND 'adapter.quarantined' = ANY(w.events)"
    " WHERE r.id = :revision"
)


def notify_finished(conn: Connection, batch: UUID, webhook: UUID | None = None) -> None:
    """Writes the event that a batch has finished, where no job's end said so. webhook: for this one alone."""
    conn.execute(_NOTIFY_FINISHED, {"batch": batch, "webhook": webhook})


def notify_quarantine(conn: Connection, revision: UUID) -> None:
    """Writes the event that `revision` was quarantined, in the transaction that does it."""
    conn.execute(_NOTIFY_QUARANTINE, {"revision": revision})


@dataclass(frozen=True, kw_only=True)
class NewWebhook:
    """`batch` None: of all the tenant's batches. `failed_jobs`: what makes a batch's failures an event."""

    id: UUID
    tenant: UUID
    url: str
    events: Sequence[str]
    secret: bytes
    description: str | None = None
    batch: UUID | None = None
    failed_jobs: int | None = None


def add_webhook(conn: Connection, new: NewWebhook) -> None:
    """Registers an endpoint. Of a batch that has finished already it hears at once."""
    if new.batch is not None:
        # So that the batch's end comes wholly before this or wholly after.
        conn.execute(text("SELECT FROM batches WHERE id = :id FOR NO KEY UPDATE"), {"id": new.batch})
    conn.execute(
        text(
            "INSERT INTO webhooks (id, tenant_id, url, events, description, batch_id, failed_jobs, secret)"
            " VALUES (:id, :tenant, :url, :events, :description, :batch, :failed_jobs, :secret)"
        ),
        {
            "id": new.id,
            "tenant": new.tenant,
            "url": new.url,
            "events": list(new.events),
            "description": new.description,
            "batch": new.batch,
            "failed_jobs": new.failed_jobs,
            "secret": new.secret,
        },
    )
    if new.batch is not None:
        notify_finished(conn, new.batch, new.id)


_READ = (
    "SELECT w.*, clock_timestamp() AS read_at,"
    " (SELECT count(*) FROM webhook_deliveries d WHERE d.webhook_id = w.id AND d.state = 'pending') AS num_pending"
    " FROM webhooks w"
)


def read_webhook(conn: Connection, webhook: UUID) -> Row[Any] | None:
    return conn.execute(text(f"{_READ} WHERE w.id = :id"), {"id": webhook}).one_or_none()


def list_webhooks(conn: Connection) -> Sequence[Row[Any]]:
    """All of the caller's, oldest first: there are few."""
    return conn.execute(text(f"{_READ} ORDER BY w.id")).all()


def count_webhooks(conn: Connection, *, of_batches: bool) -> int:
    """How many the caller has of all batches, or of single ones that have not finished."""
    statement = (
        "SELECT count(*) FROM webhooks w JOIN batches b ON b.id = w.batch_id WHERE b.finished_at IS NULL"
        if of_batches
        else "SELECT count(*) FROM webhooks WHERE batch_id IS NULL"
    )
    count: int = conn.execute(text(statement)).scalar_one()
    return count


# What waits for a disabled endpoint is due at infinity: nobody need look at it.
_PARK = text("UPDATE webhook_deliveries SET due_at = 'infinity' WHERE webhook_id = :id AND state = 'pending'")
_WAKE = text(
    "UPDATE webhook_deliveries SET due_at = clock_timestamp(), attempt = 0"
    " WHERE webhook_id = :id AND state = 'pending' AND due_at = 'infinity'"
)

# An absent column is left alone: null is a value of some.
_CHANGES = {
    "url": "url = :url",
    "events": "events = :events",
    "description": "description = :description",
    "failed_jobs": "failed_jobs = :failed_jobs",
    "enabled": (
        "disabled_at = CASE WHEN :enabled THEN NULL ELSE coalesce(disabled_at, clock_timestamp()) END,"
        " disabled_reason = CASE WHEN :enabled THEN NULL ELSE coalesce(disabled_reason, 'you disabled it') END"
    ),
}


def change_webhook(conn: Connection, webhook: UUID, changes: Mapping[str, Any]) -> None:
    """Sets those of url, events, description, failed_jobs and enabled that are in `changes`."""
    if changes:
        listed = ", ".join(_CHANGES[name] for name in changes)
        conn.execute(text(f"UPDATE webhooks SET {listed} WHERE id = :id"), {"id": webhook, **changes})
    if "enabled" in changes:
        conn.execute(_WAKE if changes["enabled"] else _PARK, {"id": webhook})


def rotate_secret(conn: Connection, webhook: UUID, secret: bytes, *, overlap_s: float) -> None:
    """Signs with `secret` from now on, and with the one before for `overlap_s` seconds more."""
    conn.execute(
        text(
            "UPDATE webhooks SET previous_secret = secret, secret = :secret,"
            " previous_until = clock_timestamp() + make_interval(secs => :overlap_s) WHERE id = :id"
        ),
        {"id": webhook, "secret": secret, "overlap_s": overlap_s},
    )


def delete_webhook(conn: Connection, webhook: UUID) -> bool:
    """Deletes the endpoint and its deliveries. False where there is none."""
    is_there = conn.execute(text("DELETE FROM webhooks WHERE id = :id"), {"id": webhook}).rowcount > 0
    # One that is being written at this moment has no endpoint any more, and goes as it ages.
    conn.execute(text("DELETE FROM webhook_deliveries WHERE webhook_id = :id"), {"id": webhook})
    return is_there


def add_delivery(conn: Connection, webhook: Row[Any], event: str, payload: str) -> UUID:
    """An event for one endpoint, whatever it subscribes to. Returns the delivery."""
    made: UUID = conn.execute(
        text(
            "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event, payload)"
            " VALUES (:tenant, :webhook, :event, :payload) RETURNING id"
        ),
        {"tenant": webhook.tenant_id, "webhook": webhook.id, "event": event, "payload": payload},
    ).scalar_one()
    return made


def list_deliveries(conn: Connection, webhook: UUID, limit: int) -> Sequence[Row[Any]]:
    """The newest deliveries of an endpoint."""
    statement = (
        "SELECT id, event, payload, state, attempt, nullif(due_at, 'infinity') AS due_at, status, error, created_at,"
        " ended_at FROM webhook_deliveries WHERE webhook_id = :id ORDER BY created_at DESC, id LIMIT :limit"
    )
    return conn.execute(text(statement), {"id": webhook, "limit": limit}).all()


# What follows runs as `medley_work`.

# A closed tenant hears nothing: what waits stays due, and goes out if its deletion is called off.
_IS_OPEN = "EXISTS (SELECT FROM tenants t WHERE t.id = {row}.tenant_id AND t.delete_requested_at IS NULL)"

# Of each endpoint one: a slow one holds up its own events alone, and hears them in order.
_DUE = text(
    "SELECT d.id FROM webhooks w CROSS JOIN LATERAL (SELECT d.id, d.due_at FROM webhook_deliveries d"
    "  WHERE d.webhook_id = w.id AND d.due_at <= statement_timestamp() ORDER BY d.due_at, d.created_at LIMIT 1) d"
    f" WHERE w.disabled_at IS NULL AND {_IS_OPEN.format(row='w')} AND EXISTS ("
    "  SELECT FROM webhook_deliveries a WHERE a.due_at <= statement_timestamp())"
    " AND NOT EXISTS (SELECT FROM webhook_deliveries o WHERE o.webhook_id = w.id AND o.due_at IS NOT NULL"
    "  AND o.leased_until > statement_timestamp())"
    " ORDER BY d.due_at LIMIT :limit"
)


def read_due(conn: Connection, limit: int = 100) -> list[UUID]:
    """The next delivery of each endpoint that is due and to which nothing is being sent."""
    return list(conn.execute(_DUE, {"limit": limit}).scalars())


def due_rings(conn: Connection) -> list[UUID]:
    """Deliveries to send a message for, each once a due time; a look finds those whose message is lost."""
    return list(
        conn.execute(
            text(
                "UPDATE webhook_deliveries SET rung_at = clock_timestamp() WHERE id IN ("
                " SELECT id FROM webhook_deliveries d WHERE due_at <= statement_timestamp()"
                f"  AND (rung_at IS NULL OR rung_at < due_at) AND {_IS_OPEN.format(row='d')}"
                "  LIMIT :limit FOR UPDATE SKIP LOCKED) RETURNING id"
            ),
            {"limit": RINGS},
        ).scalars()
    )


@dataclass(frozen=True)
class Attempt:
    """One attempt to deliver: to where, what, and with which secrets it is signed (the newest first)."""

    delivery: UUID
    webhook: UUID
    number: int
    url: str
    payload: str
    secrets: tuple[bytes, ...]


def begin_attempt(conn: Connection, delivery: UUID) -> Attempt | None:
    """Leases a due delivery. None where it has ended or is not due, or its endpoint is being sent to or disabled, or
    its tenant is closed.
    """
    # One at a time, whatever the isolation: two that look at once must not both see that nothing is being sent.
    conn.execute(
        text(
            "SELECT FROM webhooks WHERE id = (SELECT webhook_id FROM webhook_deliveries WHERE id = :id)"
            " FOR NO KEY UPDATE"
        ),
        {"id": delivery},
    )
    is_open = _IS_OPEN.format(row="w")
    row = conn.execute(
        text(
            "UPDATE webhook_deliveries d SET attempt = d.attempt + 1,"
            "  leased_until = clock_timestamp() + make_interval(secs => :lease_s)"
            f" FROM webhooks w WHERE d.id = :id AND w.id = d.webhook_id AND w.disabled_at IS NULL AND {is_open}"
            "  AND d.due_at <= clock_timestamp() AND NOT EXISTS (SELECT FROM webhook_deliveries o"
            "   WHERE o.webhook_id = d.webhook_id AND o.due_at IS NOT NULL AND o.leased_until > clock_timestamp())"
            " RETURNING d.webhook_id, d.attempt, w.url, d.payload, w.secret,"
            "  CASE WHEN w.previous_until > clock_timestamp() THEN w.previous_secret END AS previous_secret"
        ),
        {"id": delivery, "lease_s": LEASE_S},
    ).one_or_none()
    if row is None:
        return None
    secrets = tuple(bytes(s) for s in (row.secret, row.previous_secret) if s is not None)
    return Attempt(delivery, row.webhook_id, row.attempt, row.url, row.payload, secrets)


def end_attempt(
    conn: Connection, attempt: Attempt, *, status: int | None, error: str | None, retry_in_s: float | None
) -> None:
    """Notes how an attempt ended: error None is delivered, retry_in_s None is the last one. Fenced by its number."""
    state = "delivered" if error is None else "failed" if retry_in_s is None else "pending"
    conn.execute(
        text(
            "UPDATE webhook_deliveries SET state = :state, status = :status, error = :error, leased_until = NULL,"
            " due_at = CASE WHEN :state = 'pending' THEN clock_timestamp() + make_interval(secs => :retry_in_s) END,"
            " ended_at = CASE WHEN :state = 'pending' THEN NULL ELSE clock_timestamp() END"
            " WHERE id = :id AND attempt = :attempt AND state = 'pending'"
        ),
        {
            "id": attempt.delivery,
            "attempt": attempt.number,
            "state": state,
            "status": status,
            "error": error,
            "retry_in_s": retry_in_s or 0.0,
        },
    )


def disable(conn: Connection, webhook: UUID, reason: str) -> None:
    """Marks an endpoint that does not take its events. Those that wait stay, for when it is enabled again."""
    conn.execute(
        text(
            "UPDATE webhooks SET disabled_at = clock_timestamp(), disabled_reason = :reason"
            " WHERE id = :id AND disabled_at IS NULL"
        ),
        {"id": webhook, "reason": reason},
    )
    conn.execute(_PARK, {"id": webhook})


def next_due(conn: Connection, webhook: UUID) -> UUID | None:
    """The endpoint's next due delivery."""
    found: UUID | None = conn.execute(
        text(
            "SELECT id FROM webhook_deliveries WHERE webhook_id = :id AND due_at <= statement_timestamp()"
            " ORDER BY due_at, created_at LIMIT 1"
        ),
        {"id": webhook},
    ).scalar_one_or_none()
    return found
