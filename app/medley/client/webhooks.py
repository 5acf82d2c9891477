"""A tenant's webhooks: endpoints that are told of events; registered, changed, rotated, tried.

Who receives checks each message with `medley.verify_webhook(body, headers, secret)`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from medley.client.transport import Transport, segment
from medley.client.types import Delivery, Webhook
from medley.spec.webhooks import Event


class _Webhooks(msgspec.Struct):
    webhooks: list[Webhook]


class _Deliveries(msgspec.Struct):
    deliveries: list[Delivery]


class Webhooks:
    """The webhooks of the key's tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def add(
        self,
        url: str,
        events: Sequence[str] = (Event.BATCH_FINISHED, Event.SWEEP_FINISHED),
        *,
        description: str | None = None,
        batch_id: str | None = None,
        failed_jobs: int | None = None,
    ) -> Webhook:
        """Registers an https:// URL. Keep `secret`: it is not shown again.

        events: of `medley.spec.webhooks.Event`. batch_id: of this batch or sweep alone, also of one that has
        finished. failed_jobs: how many failures of a batch are the event batch.failing.
        """
        fields = {"description": description, "batch_id": batch_id, "failed_jobs": failed_jobs}
        body = {"url": url, "events": list(events)} | {k: v for k, v in fields.items() if v is not None}
        return self._transport.post(Webhook, "/v1/webhooks", body, key=uuid.uuid4().hex)

    def list(self) -> list[Webhook]:
        """All of them, oldest first."""
        return self._transport.get(_Webhooks, "/v1/webhooks").webhooks

    def get(self, webhook_id: str) -> Webhook:
        """Raises NotFound."""
        return self._transport.get(Webhook, _path(webhook_id))

    def update(
        self,
        webhook_id: str,
        *,
        url: str | UnsetType = UNSET,
        events: Sequence[str] | UnsetType = UNSET,
        description: str | UnsetType | None = UNSET,
        failed_jobs: int | UnsetType | None = UNSET,
        enabled: bool | UnsetType = UNSET,
    ) -> Webhook:
        """Changes what is given. Enabled again, it is sent what has waited."""
        given: dict[str, Any] = {
            "url": url,
            "events": events,
            "description": description,
            "failed_jobs": failed_jobs,
            "enabled": enabled,
        }
        return self._transport.patch(Webhook, _path(webhook_id), {k: v for k, v in given.items() if v is not UNSET})

    def rotate(self, webhook_id: str, *, overlap_s: float | None = None) -> Webhook:
        """A new secret, in the answer alone; the one before signs too for `overlap_s` seconds (None: a day)."""
        body = {} if overlap_s is None else {"overlap_s": overlap_s}
        return self._transport.post(Webhook, f"{_path(webhook_id)}/rotate", body, key=uuid.uuid4().hex)

    def ping(self, webhook_id: str) -> Delivery:
        """Sends the event `ping`; `deliveries` says what became of it."""
        return self._transport.post(Delivery, f"{_path(webhook_id)}/ping")

    def deliveries(self, webhook_id: str, *, limit: int = 100) -> Sequence[Delivery]:
        """The newest events of the endpoint and how they stand."""
        return self._transport.get(_Deliveries, f"{_path(webhook_id)}/deliveries", {"limit": limit}).deliveries

    def delete(self, webhook_id: str) -> None:
        """Deletes the endpoint, and the events that wait for it."""
        self._transport.request("DELETE", _path(webhook_id))


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{segment(webhook_id)}"
