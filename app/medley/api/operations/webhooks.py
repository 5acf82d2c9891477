"""Operations on webhooks: /v1/webhooks."""

from __future__ import annotations

import msgspec

from medley.api.openapi import Operation
from medley.api.operations.parameters import most
from medley.api.webhook_bodies import Delivery, RotateBody, Webhook, WebhookBody, WebhookChange


class WebhookList(msgspec.Struct):
    """All of the tenant's webhooks, oldest first."""

    webhooks: list[Webhook]


class DeliveryList(msgspec.Struct):
    """The newest events of an endpoint, and what became of each."""

    deliveries: list[Delivery]


WEBHOOKS = [
    Operation(
        method="POST",
        path="/v1/webhooks",
        summary="Register an endpoint; its secret is shown this once",
        body=WebhookBody,
        answers={201: Webhook},
        refusals=(409,),
        creates=True,
    ),
    Operation(method="GET", path="/v1/webhooks", summary="List webhooks", answers={200: WebhookList}),
    Operation(method="GET", path="/v1/webhooks/{webhook_id}", summary="Read a webhook", answers={200: Webhook}),
    Operation(
        method="PATCH",
        path="/v1/webhooks/{webhook_id}",
        summary="Change a webhook, or enable it again",
        body=WebhookChange,
        answers={200: Webhook},
    ),
    Operation(
        method="DELETE",
        path="/v1/webhooks/{webhook_id}",
        summary="Delete a webhook, and the events that wait for it",
        answers={204: None},
    ),
    Operation(
        method="POST",
        path="/v1/webhooks/{webhook_id}/rotate",
        summary="Make a new secret; the one before signs too for a while",
        body=RotateBody,
        answers={200: Webhook},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="POST",
        path="/v1/webhooks/{webhook_id}/ping",
        summary="Send the event `ping`",
        answers={202: Delivery},
        refusals=(409,),
    ),
    Operation(
        method="GET",
        path="/v1/webhooks/{webhook_id}/deliveries",
        summary="Read the newest events of a webhook, and what became of each",
        query=(most(1_000, 100),),
        answers={200: DeliveryList},
    ),
]
