"""/v1/webhooks: endpoints that are told of events; registered, changed, rotated, tried, and what became of events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, administers, reads
from medley.api.bodies import read_whole
from medley.api.decoding import Query, decode_body
from medley.api.errors import Conflict, FaultList, NotFound
from medley.api.idempotency import REPLAYED, read_create
from medley.api.job_bodies import shown_value
from medley.api.shapes import answer
from medley.api.webhook_bodies import (
    RotateBody,
    WebhookBody,
    WebhookChange,
    delivery_of,
    webhook_faults,
    webhook_of,
)
from medley.db import webhooks
from medley.db.batches import read_batch
from medley.rings import DELIVER_TASK
from medley.spec.errors import Fault
from medley.spec.ids import BATCH, SWEEP, WEBHOOK, parse_id, public_id, uuid7
from medley.spec.webhooks import PING, Event, new_secret

MAX_WEBHOOKS = 100  # of one tenant, of all its batches: each end of a batch looks at all of these
MAX_OF_BATCHES = 10_000  # of one tenant, of single batches that have not finished
MAX_DELIVERIES = 1_000
DELIVERIES = 100

router = APIRouter(prefix="/v1/webhooks")


@router.post("")
async def create(request: Request, who: Caller = Depends(administers)) -> Response:
    """The answer holds the secret, which is not shown again."""
    Query(request).end()
    data, digest = await read_whole(request)
    wanted = read_create(request, digest)
    body = decode_body(data, WebhookBody)
    allow_loopback = who.services.settings.webhook_loopback

    def act(conn: Connection) -> tuple[Row[Any], bool]:
        new_id = uuid7()
        existing = wanted.claim(conn, who.tenant.id, new_id)
        if existing is not None:
            return _require(conn, existing, public_id(WEBHOOK, existing)), True
        faults = FaultList()
        batch = _batch_of(conn, body.batch_id, faults)
        faults.extend(
            webhook_faults(
                url=body.url,
                events=body.events,
                description=body.description,
                failed_jobs=body.failed_jobs,
                is_of_batch=body.batch_id is not None,
                allow_loopback=allow_loopback,
            )
        )
        faults.raise_any()
        limit = MAX_WEBHOOKS if batch is None else MAX_OF_BATCHES
        if webhooks.count_webhooks(conn, of_batches=batch is not None) >= limit:
            raise Conflict(f"there are {limit} webhooks, which is the limit; delete one first")
        new = webhooks.NewWebhook(
            id=new_id,
            tenant=who.tenant.id,
            url=body.url,
            events=[event.value for event in body.events],
            secret=new_secret(),
            description=body.description,
            batch=batch,
            failed_jobs=body.failed_jobs,
        )
        webhooks.add_webhook(conn, new)
        # A URL may hold a token of the receiver's.
        who.note(conn, "webhook.create", public_id(WEBHOOK, new_id), events=body.events, batch=body.batch_id)
        return _require(conn, new_id, ""), False

    row, is_replay = await who.services.sql.run(who.tenant.id, act)
    return answer(webhook_of(row, with_secret=True), 201, REPLAYED if is_replay else None)


def _batch_of(conn: Connection, shown_id: str | None, faults: FaultList) -> UUID | None:
    if shown_id is None:
        return None
    batch = parse_id(BATCH, shown_id) or parse_id(SWEEP, shown_id)
    if batch is None or read_batch(conn, batch) is None:
        faults.add(Fault(field="batch_id", got=shown_value(shown_id), wanted="the id of a batch or sweep of yours"))
    return batch


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    rows = await who.services.sql.run(who.tenant.id, webhooks.list_webhooks)
    return answer({"webhooks": [webhook_of(row) for row in rows]})


@router.get("/{webhook_id}")
async def read(webhook_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(webhook_of(await _with(who, webhook_id, lambda _, row: row)))


@router.patch("/{webhook_id}")
async def change(webhook_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """`enabled` true sends at once what has waited for a disabled endpoint."""
    Query(request).end()
    data, _ = await read_whole(request)
    await _with(who, webhook_id, lambda _, row: row)  # another's webhook has no wrong body
    body = decode_body(data, WebhookChange)
    changes = {name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not UNSET}
    allow_loopback = who.services.settings.webhook_loopback

    def act(conn: Connection, row: Row[Any]) -> Row[Any]:
        after = {**row._mapping, **changes}
        FaultList(
            webhook_faults(
                url=after["url"],
                events=[Event(event) for event in after["events"]],
                description=after["description"],
                failed_jobs=after["failed_jobs"],
                is_of_batch=row.batch_id is not None,
                allow_loopback=allow_loopback,
            )
        ).raise_any()
        if "events" in changes:
            changes["events"] = [Event(event).value for event in changes["events"]]
        if changes:
            webhooks.change_webhook(conn, row.id, changes)
            who.note(conn, "webhook.change", webhook_id, changed=sorted(changes))
        return _require(conn, row.id, webhook_id)

    return answer(webhook_of(await _with(who, webhook_id, act)))


@router.delete("/{webhook_id}")
async def delete(webhook_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """Deletes the endpoint, and the events that wait for it."""
    Query(request).end()

    def act(conn: Connection, row: Row[Any]) -> None:
        webhooks.delete_webhook(conn, row.id)
        who.note(conn, "webhook.delete", webhook_id)

    await _with(who, webhook_id, act)
    return Response(status_code=204)


@router.post("/{webhook_id}/rotate")
async def rotate(webhook_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """A new secret, shown this once; the one before signs too for `overlap_s` seconds (a day)."""
    Query(request).end()
    data, digest = await read_whole(request)
    await _with(who, webhook_id, lambda _, row: row)
    wanted = read_create(request, digest)
    body = decode_body(data or b"{}", RotateBody)

    def act(conn: Connection, row: Row[Any]) -> tuple[Row[Any], bool]:
        # Rotated twice, the secret that receivers know would be gone.
        is_replay = wanted.claim(conn, who.tenant.id, row.id) is not None
        if not is_replay:
            webhooks.rotate_secret(conn, row.id, new_secret(), overlap_s=body.overlap_s)
            who.note(conn, "webhook.rotate", webhook_id, overlap_s=body.overlap_s)
        return _require(conn, row.id, webhook_id), is_replay

    row, is_replay = await _with(who, webhook_id, act)
    return answer(webhook_of(row, with_secret=True), 200, REPLAYED if is_replay else None)


@router.post("/{webhook_id}/ping")
async def ping(webhook_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """Sends the event `ping`, as any other event is sent."""
    Query(request).end()

    def act(conn: Connection, row: Row[Any]) -> Row[Any]:
        if row.disabled_at is not None:
            raise Conflict(f"{webhook_id} is disabled: {row.disabled_reason}; enable it first (PATCH)")
        payload = {"type": PING, "timestamp": datetime.now(UTC), "data": {"id": webhook_id, "object": "webhook"}}
        webhooks.add_delivery(conn, row, PING, msgspec.json.encode(payload).decode())
        return webhooks.list_deliveries(conn, row.id, 1)[0]

    row = await _with(who, webhook_id, act)
    who.services.ringer.send_task(DELIVER_TASK, row.id.hex)
    return answer(delivery_of(row), 202)


@router.get("/{webhook_id}/deliveries")
async def list_deliveries(webhook_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    """The newest events of the endpoint, and what became of each."""
    query = Query(request)
    limit = query.whole("limit", DELIVERIES, low=1, high=MAX_DELIVERIES)
    query.end()
    rows = await _with(who, webhook_id, lambda conn, row: webhooks.list_deliveries(conn, row.id, limit))
    return answer({"deliveries": [delivery_of(row) for row in rows]})


async def _with(who: Caller, webhook_id: str, act: Callable[[Connection, Row[Any]], Any]) -> Any:
    """`act` on the caller's webhook, in one transaction. Raises NotFound."""
    webhook = parse_id(WEBHOOK, webhook_id)
    if webhook is None:
        raise NotFound("webhook", webhook_id)
    return await who.services.sql.run(who.tenant.id, lambda conn: act(conn, _require(conn, webhook, webhook_id)))


def _require(conn: Connection, webhook: UUID, shown_id: str) -> Row[Any]:
    row = webhooks.read_webhook(conn, webhook)
    if row is None:
        raise NotFound("webhook", shown_id)
    return row
