"""Operations on the caller's tenant, its keys, limits, use and audit log; on the fleet, and on the process itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from medley.api.audit import Entry
from medley.api.keys import Key, KeyBody, RotationBody
from medley.api.openapi import Operation, Parameter
from medley.api.operations.parameters import TEXT, most
from medley.api.usage import UsageReport
from medley.db.usage import By


class Live(msgspec.Struct):
    """The process lives."""

    live: bool


class Ready(msgspec.Struct):
    """Whether the service can serve, and what of it works."""

    postgres: bool
    migrations: bool
    redis: bool
    model: bool


class TenantName(msgspec.Struct):
    """Whose key this is, and for how many days after its end a batch is kept."""

    name: str
    retention_days: int


class TenantEnd(msgspec.Struct):
    """The tenant is closed; until `delete_due_at` the operator can call its deletion off."""

    name: str
    delete_due_at: datetime


class KeyPage(msgspec.Struct):
    """Keys, newest first. `next`: what `before` is for the next page, null on the last."""

    keys: list[Key]
    next: str | None


class QuotaUse(msgspec.Struct):
    limit: float
    used: float | None


class LimitList(msgspec.Struct):
    """What the tenant may have and has (`quotas`), and what one request may be (`request`)."""

    tenant: str
    quotas: dict[str, QuotaUse]
    request: dict[str, int]


class AuditPage(msgspec.Struct):
    """What was changed by hand, newest first. `next`: what `before` is for the next page, null on the last."""

    entries: list[Entry]
    next: int | None


class WorkerShape(msgspec.Struct):
    id: str
    state: str
    desired_state: str
    max_num_seqs: int
    num_leased: int
    num_resident: int
    stats: dict[str, Any]


class WorkerList(msgspec.Struct):
    """The pool's workers; `num_leased` counts the caller's own jobs."""

    workers: list[WorkerShape]


_DAY = {"type": "string", "format": "date"}
_USAGE_QUERY = (
    Parameter("from", "The first day (UTC); 30 days in all where none is given.", _DAY, "2031-05-01"),
    Parameter("to", "The last day; today where none is given.", _DAY, "2031-05-31"),
    Parameter("by", "What a row is about.", {"type": "string", "enum": [*By], "default": By.DAY}, By.ADAPTER),
)

OPEN = [
    Operation(method="GET", path="/livez", summary="Whether the process lives", answers={200: Live}, is_open=True),
    Operation(
        method="GET",
        path="/readyz",
        summary="Whether the service can serve",
        answers={200: Ready, 503: Ready},
        is_open=True,
    ),
]
KEYS = [
    Operation(
        method="POST",
        path="/v1/keys",
        summary="Make a key, which is shown this once",
        body=KeyBody,
        answers={201: Key},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/keys",
        summary="List the tenant's keys",
        query=(
            Parameter("before", "The key from which to go on, as `next` gave it.", TEXT, "mk_0123456789abcdef"),
            most(1_000, 1_000),
        ),
        answers={200: KeyPage},
    ),
    Operation(method="GET", path="/v1/keys/{key_id}", summary="Read a key", answers={200: Key}),
    Operation(
        method="POST",
        path="/v1/keys/{key_id}/rotate",
        summary="Make a successor of a key; both work until the old one ends",
        body=RotationBody,
        answers={201: Key},
        refusals=(409,),
        creates=True,
    ),
    Operation(method="DELETE", path="/v1/keys/{key_id}", summary="Revoke a key", answers={204: None}),
]
REST = [
    Operation(
        method="DELETE",
        path="/v1/tenant",
        summary="Close the caller's tenant, and delete it after some days",
        query=(Parameter("confirm", "The tenant's name.", TEXT, "acme"),),
        answers={202: TenantEnd},
    ),
    Operation(
        method="GET", path="/v1/limits", summary="Read what the tenant may have, and has", answers={200: LimitList}
    ),
    Operation(
        method="GET",
        path="/v1/audit",
        summary="Read who changed what by hand",
        query=(
            Parameter("before", "The number from which to go on, as `next` gave it.", {"type": "integer"}, 7),
            most(1_000, 100),
        ),
        answers={200: AuditPage},
    ),
    Operation(
        method="GET",
        path="/v1/usage",
        summary="Read the jobs and tokens that workers did for the tenant",
        query=_USAGE_QUERY,
        answers={200: UsageReport},
    ),
    Operation(method="GET", path="/v1/tenant", summary="Whose key this is", answers={200: TenantName}),
    Operation(method="GET", path="/v1/workers", summary="List the pool's workers", answers={200: WorkerList}),
]
