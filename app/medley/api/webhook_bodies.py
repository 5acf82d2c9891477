"""The bodies of webhooks, judged whole: where they may lead, what they may be told, and the JSON that they have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import Row

from medley.api.job_bodies import label_faults, shown_value
from medley.endpoints import NotAllowed, judge_url
from medley.spec.errors import Fault
from medley.spec.ids import BATCH, MESSAGE, WEBHOOK, public_id
from medley.spec.webhooks import Event, shown_secret

FailedJobs = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class WebhookBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`batch_id`: of that batch alone. `failed_jobs`: as many failures of a batch are the event batch.failing."""

    url: str
    events: list[Event]
    description: str | None = None
    batch_id: str | None = None
    failed_jobs: FailedJobs | None = None


class WebhookChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is absent stays."""

    url: str | UnsetType = UNSET
    events: list[Event] | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    failed_jobs: FailedJobs | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class RotateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """For how long the secret before signs too."""

    overlap_s: Annotated[float, msgspec.Meta(ge=0, le=7 * 86_400)] = 86_400.0


class Webhook(msgspec.Struct, kw_only=True):
    """`secret` is shown when it is made, and never again."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    description: str | None
    batch_id: str | None
    failed_jobs: int | None
    state: str
    disabled_at: datetime | None
    disabled_reason: str | None
    created_at: datetime
    num_pending: int
    previous_secret_until: datetime | None
    secret: str | UnsetType = UNSET


class Delivery(msgspec.Struct, kw_only=True):
    """One event on its way; `id` is the message's `webhook-id` in every attempt."""

    id: str
    event: str
    state: str
    attempt: int
    next_attempt_at: datetime | None
    status: int | None
    error: str | None
    created_at: datetime
    ended_at: datetime | None
    payload: dict[str, Any]


def webhook_faults(
    *,
    url: str,
    events: Collection[Event],
    description: str | None,
    failed_jobs: int | None,
    is_of_batch: bool,
    allow_loopback: bool,
) -> Iterator[Fault]:
    """Everything that is wrong with a webhook as it would stand."""
    try:
        judge_url(url, allow_loopback=allow_loopback)
    except NotAllowed as error:
        yield Fault(field="url", got=shown_value(url), wanted=str(error))
    yield from label_faults("description", description)
    if not events or len(set(events)) != len(events):
        yield Fault(field="events", got=shown_value([e.value for e in events]), wanted="distinct events, one at least")
    if is_of_batch and Event.ADAPTER_QUARANTINED in events:
        yield Fault(field="events", got=Event.ADAPTER_QUARANTINED, wanted="events of a batch, where batch_id is given")
    if (Event.BATCH_FAILING in events) != (failed_jobs is not None):
        got = "nothing" if failed_jobs is None else str(failed_jobs)
        wanted = f"a number of failed jobs with the event {Event.BATCH_FAILING}, and with it alone"
        yield Fault(field="failed_jobs", got=got, wanted=wanted)


def webhook_of(row: Row[Any], *, with_secret: bool = False) -> Webhook:
    """From a row of `webhooks.read_webhook`."""
    is_rotating = row.previous_until is not None and row.previous_until > row.read_at
    webhook = Webhook(
        id=public_id(WEBHOOK, row.id),
        url=row.url,
        events=row.events,
        description=row.description,
        batch_id=None if row.batch_id is None else public_id(BATCH, row.batch_id),
        failed_jobs=row.failed_jobs,
        state="enabled" if row.disabled_at is None else "disabled",
        disabled_at=row.disabled_at,
        disabled_reason=row.disabled_reason,
        created_at=row.created_at,
        num_pending=row.num_pending,
        previous_secret_until=row.previous_until if is_rotating else None,
    )
    if with_secret:
        webhook.secret = shown_secret(bytes(row.secret))
    return webhook


def delivery_of(row: Row[Any]) -> Delivery:
    """From a row of `webhooks.list_deliveries`."""
    return Delivery(
        id=public_id(MESSAGE, row.id),
        event=row.event,
        state=row.state,
        attempt=row.attempt,
        next_attempt_at=row.due_at,
        status=row.status,
        error=row.error,
        created_at=row.created_at,
        ended_at=row.ended_at,
        payload=msgspec.json.decode(row.payload),
    )
