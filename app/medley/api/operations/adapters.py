"""Operations on adapters, and on grants of them: /v1/adapters and /v1/shared-adapters."""

from __future__ import annotations

from typing import Any

import msgspec

from medley.api.grants import GrantBody
from medley.api.openapi import Operation, Parameter
from medley.api.operations.parameters import AFTER_NAME, TEXT, most
from medley.api.shapes import Adapter, AdapterGrant
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME


class AdapterPage(msgspec.Struct):
    """Adapters by name. `next`: what `after` is for the next page, null on the last."""

    adapters: list[Adapter]
    next: str | None


class GrantList(msgspec.Struct):
    """With whom an adapter is shared."""

    grants: list[AdapterGrant]


_FILES: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": [CONFIG_NAME, WEIGHTS_NAME],
        "additionalProperties": False,
        "properties": {name: {"type": "string", "format": "binary"} for name in (CONFIG_NAME, WEIGHTS_NAME)},
    },
    "example": {CONFIG_NAME: '{"peft_type":"LORA","r":8}', WEIGHTS_NAME: "the file's bytes"},
}

ADAPTERS = [
    Operation(
        method="PUT",
        path="/v1/adapters/{name}",
        summary="Upload a revision: its two files as parts of a multipart body",
        other_bodies={"multipart/form-data": _FILES},
        answers={201: Adapter, 200: Adapter},
    ),
    Operation(
        method="GET",
        path="/v1/adapters",
        summary="List adapters",
        query=(AFTER_NAME, most(10_000, 1_000)),
        answers={200: AdapterPage},
    ),
    Operation(method="GET", path="/v1/adapters/{name}", summary="Read an adapter", answers={200: Adapter}),
    Operation(method="DELETE", path="/v1/adapters/{name}", summary="Delete an adapter", answers={204: None}),
    Operation(
        method="POST",
        path="/v1/adapters/{name}/grants",
        summary="Share an adapter with another tenant",
        body=GrantBody,
        answers={201: AdapterGrant, 200: AdapterGrant},
    ),
    Operation(
        method="GET",
        path="/v1/adapters/{name}/grants",
        summary="List with whom an adapter is shared",
        answers={200: GrantList},
    ),
    Operation(
        method="DELETE",
        path="/v1/adapters/{name}/grants/{tenant}",
        summary="Share an adapter with a tenant no longer",
        query=(Parameter("revision", "This revision alone.", TEXT, "rev_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),),
        answers={204: None},
    ),
    Operation(
        method="GET",
        path="/v1/shared-adapters",
        summary="List other tenants' adapters that are shared with the caller",
        query=(
            Parameter("after", "The whole name from which to go on, as `next` gave it.", TEXT, "acme/caesar-3"),
            most(10_000, 1_000),
        ),
        answers={200: AdapterPage},
    ),
    Operation(
        method="GET",
        path="/v1/shared-adapters/{owner}/{name}",
        summary="Read an adapter that is shared with the caller",
        answers={200: Adapter},
    ),
]
