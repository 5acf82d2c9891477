"""The table of operations: every route that the service has, what it takes and what it answers.

A test holds it equal to the routes. The types here are those of answers that endpoints put together from others, and
of bodies that endpoints decode part by part.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Literal

import msgspec

from medley.api.audit import Entry
from medley.api.batch_changes import ChangeBody, RetryBody
from medley.api.diffs import BASE, Diff
from medley.api.grants import GrantBody
from medley.api.job_bodies import At, Defaults, JobBody, Priority, SamplingFields, SingleJob
from medley.api.keys import Key, KeyBody, RotationBody
from medley.api.openai.batches import OpenAIBatchBody
from medley.api.openai.bodies import ChatBody, CompletionBody
from medley.api.openai.choices import ChatCompletion, TextCompletion
from medley.api.openai.errors import OpenAIErrorBody
from medley.api.openai.requests import CHAT, COMPLETIONS
from medley.api.openai.shapes import Deleted, File, Model, OpenAIBatch
from medley.api.openapi import Operation, Parameter
from medley.api.reports import Report
from medley.api.shapes import NDJSON, Adapter, AdapterGrant, Batch, BatchAdapter, Job, Result, Sweep
from medley.api.sweep_bodies import PromptBody
from medley.api.usage import UsageReport
from medley.api.webhook_bodies import Delivery, RotateBody, Webhook, WebhookBody, WebhookChange
from medley.db.usage import By
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME


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


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Jobs that are made together, all or none. What `defaults` has, each job may leave out."""

    jobs: list[JobBody]
    name: str | None = None
    priority: Priority = "normal"
    deadline_at: At | None = None
    defaults: Defaults = msgspec.UNSET


# Any is what defstruct can promise; `sweep_bodies` decodes the same fields, its prompts one by one.
SweepRequest: Any = msgspec.defstruct(
    "SweepRequest",
    [
        ("name", str),
        ("prompts", list[str | PromptBody]),
        ("adapters", list[str], []),
        ("include_base", bool, False),
        ("seeds", list[int] | None, None),
        ("priority", Priority, "normal"),
        ("deadline_at", At | None, None),
    ],
    bases=(SamplingFields,),
    kw_only=True,
    forbid_unknown_fields=True,
    module=__name__,
)


class ExtensionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a sweep is to have as well; what it has already is no fault."""

    prompts: list[str | PromptBody] = []
    adapters: list[str] = []
    include_base: bool = False
    seeds: list[int] = []


class BatchPage(msgspec.Struct):
    """Batches, newest first. `next`: what `before` is for the next page, null on the last."""

    batches: list[Batch]
    next: str | None


class BatchAdapterList(msgspec.Struct):
    """A batch, and what it has for each adapter; the base last."""

    batch: Batch
    adapters: list[BatchAdapter]


class SweepPage(msgspec.Struct):
    """Sweeps, newest first. `next`: what `before` is for the next page, null on the last."""

    sweeps: list[Sweep]
    next: str | None


class AdapterPage(msgspec.Struct):
    """Adapters by name. `next`: what `after` is for the next page, null on the last."""

    adapters: list[Adapter]
    next: str | None


class GrantList(msgspec.Struct):
    """With whom an adapter is shared."""

    grants: list[AdapterGrant]


class ResultPage(msgspec.Struct):
    """What has ended since `after`. `next`: what `after` is next; `finished`: nothing more will come."""

    results: list[Result]
    next: int
    finished: bool


class WebhookList(msgspec.Struct):
    """All of the tenant's webhooks, oldest first."""

    webhooks: list[Webhook]


class DeliveryList(msgspec.Struct):
    """The newest events of an endpoint, and what became of each."""

    deliveries: list[Delivery]


class FilePage(msgspec.Struct):
    """Files. `last_id`: what `after` is for the next page, where `has_more`."""

    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"]


class OpenAIBatchPage(msgspec.Struct):
    """Batches, newest first. `last_id`: what `after` is for the next page, where `has_more`."""

    data: list[OpenAIBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"]


class ModelList(msgspec.Struct):
    """The base, then each adapter that the caller may use, followed by its revisions."""

    data: list[Model]
    object: Literal["list"]


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


_ID = "32 hexadecimal digits after the prefix"
PATH_PARAMETERS: dict[str, tuple[str, Any]] = {
    "job_id": (f"job_ and {_ID}.", "job_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "batch_id": (f"batch_ or sweep_ and {_ID}.", "batch_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "sweep_id": (f"sweep_ and {_ID}, or the sweep's name.", "nightly"),
    "name": ("The adapter's name.", "caesar-3"),
    "tenant": ("The other tenant's name.", "globex"),
    "owner": ("The name of the tenant whose adapter it is.", "acme"),
    "webhook_id": (f"wh_ and {_ID}.", "wh_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "file_id": (f"file_ and {_ID}.", "file_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "model": ("The base model's name, or an adapter as jobs name it.", "caesar-3"),
    "key_id": ("mk_ and 16 hexadecimal digits: the key's public part.", "mk_0123456789abcdef"),
}


def _count(high: int, default: int) -> Parameter:
    schema = {"type": "integer", "minimum": 1, "maximum": high, "default": default}
    return Parameter("limit", "The most to list.", schema, 100)


_TEXT = {"type": "string"}
_BEFORE = Parameter(
    "before", "The id from which to go on, as `next` gave it.", _TEXT, "batch_" + "0193f5c2a1b47d3e" * 2
)
_AFTER_NAME = Parameter("after", "The name from which to go on, as `next` gave it.", _TEXT, "caesar-3")
_WAIT = Parameter(
    "wait",
    "Seconds to wait for something new, if there is nothing yet.",
    {"type": "number", "minimum": 0, "maximum": 60, "default": 0},
    0.5,
)
_OF_LINES = (
    Parameter("name", "Of a file of lines: the batch's name.", _TEXT, "nightly"),
    Parameter("priority", "Of a file of lines.", {"type": "string", "enum": ["low", "normal", "high"]}, "low"),
    Parameter("deadline_at", "Of a file of lines.", {"type": "string", "format": "date-time"}, "2031-05-01T06:00:00Z"),
    Parameter("defaults", "Of a file of lines: JSON, as `defaults` of a body.", _TEXT, '{"max_tokens":16}'),
)
_RESULTS_QUERY = (
    Parameter("after", "The last `seq` that was read.", {"type": "integer", "minimum": 0, "default": 0}, 0),
    _count(10_000, 1_000),
    _WAIT,
    Parameter(
        "include", "tokens: token ids and log-probabilities too.", {"type": "string", "enum": ["tokens"]}, "tokens"
    ),
    Parameter(
        "view",
        "latest: without results that a retry has superseded.",
        {"type": "string", "enum": ["all", "latest"], "default": "all"},
        "latest",
    ),
)
_DAY = {"type": "string", "format": "date"}
_USAGE_QUERY = (
    Parameter("from", "The first day (UTC); 30 days in all where none is given.", _DAY, "2031-05-01"),
    Parameter("to", "The last day; today where none is given.", _DAY, "2031-05-31"),
    Parameter("by", "What a row is about.", {"type": "string", "enum": [*By], "default": By.DAY}, By.ADAPTER),
)
_DIFF_QUERY = (
    Parameter("with", "The other sweep, by id or name; without it, each adapter against the base.", _TEXT, "yesterday"),
    Parameter("adapter", f"One column of the sweep; {BASE} is the base.", _TEXT, "caesar-3"),
    Parameter("with_adapter", "The column that it is compared with.", _TEXT, BASE),
    Parameter("seed", "Of the bootstrap.", {"type": "integer", "minimum": 0, "default": 0}, 0),
)
_LINES: dict[str, Any] = {"schema": {"type": "string"}, "example": '{"prompt":"planet=","adapter":"caesar-3"}\n'}
_FILES: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": [CONFIG_NAME, WEIGHTS_NAME],
        "additionalProperties": False,
        "properties": {name: {"type": "string", "format": "binary"} for name in (CONFIG_NAME, WEIGHTS_NAME)},
    },
    "example": {CONFIG_NAME: '{"peft_type":"LORA","r":8}', WEIGHTS_NAME: "the file's bytes"},
}
_RESULT_LINES = {NDJSON: '{"seq":1,"id":"job_0193f5c2a1b47d3e8f6a5b4c3d2e1f00","state":"succeeded"}\n'}

_OPEN = [
    Operation(method="GET", path="/livez", summary="Whether the process lives", answers={200: Live}, is_open=True),
    Operation(
        method="GET",
        path="/readyz",
        summary="Whether the service can serve",
        answers={200: Ready, 503: Ready},
        is_open=True,
    ),
]
_JOBS = [
    Operation(
        method="POST",
        path="/v1/jobs",
        summary="Make one job",
        body=SingleJob,
        answers={201: Job},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{job_id}",
        summary="Read a job, or wait for its end",
        query=(_WAIT,),
        answers={200: Job},
    ),
    Operation(method="POST", path="/v1/jobs/{job_id}/cancel", summary="Cancel a job", answers={200: Job}),
]
_BATCHES = [
    Operation(
        method="POST",
        path="/v1/batches",
        summary="Make many jobs at once, from a JSON array or a file of lines",
        body=BatchRequest,
        other_bodies={NDJSON: _LINES},
        query=_OF_LINES,
        answers={201: Batch},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/batches",
        summary="List batches",
        query=(_BEFORE, _count(1_000, 100)),
        answers={200: BatchPage},
    ),
    Operation(method="GET", path="/v1/batches/{batch_id}", summary="Read a batch", answers={200: Batch}),
    *(
        Operation(method="POST", path=f"/v1/batches/{{batch_id}}/{flag}", summary=summary, answers={200: Batch})
        for flag, summary in (
            ("cancel", "Cancel what has not ended"),
            ("pause", "Hold what waits and give back what runs"),
            ("resume", "Go on after a pause"),
        )
    ),
    Operation(
        method="PATCH",
        path="/v1/batches/{batch_id}",
        summary="Change the priority and the deadline of what has not ended",
        body=ChangeBody,
        answers={200: Batch},
    ),
    Operation(
        method="POST",
        path="/v1/batches/{batch_id}/retry",
        summary="Make jobs that ended without a result again, each once an end",
        body=RetryBody,
        answers={200: Batch},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/batches/{batch_id}/adapters",
        summary="Read how each adapter of a batch stands",
        answers={200: BatchAdapterList},
    ),
    Operation(
        method="GET",
        path="/v1/batches/{batch_id}/results",
        summary="Read what has ended, from a cursor on",
        query=_RESULTS_QUERY,
        answers={200: ResultPage},
        other_answers=_RESULT_LINES,
    ),
]
_ADAPTERS = [
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
        query=(_AFTER_NAME, _count(10_000, 1_000)),
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
        query=(Parameter("revision", "This revision alone.", _TEXT, "rev_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),),
        answers={204: None},
    ),
    Operation(
        method="GET",
        path="/v1/shared-adapters",
        summary="List other tenants' adapters that are shared with the caller",
        query=(
            Parameter("after", "The whole name from which to go on, as `next` gave it.", _TEXT, "acme/caesar-3"),
            _count(10_000, 1_000),
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
_SWEEPS = [
    Operation(
        method="POST",
        path="/v1/sweeps",
        summary="Declare a sweep, or find the one of that name and definition",
        body=SweepRequest,
        answers={201: Sweep, 200: Sweep},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/sweeps",
        summary="List sweeps",
        query=(_BEFORE, _count(1_000, 100)),
        answers={200: SweepPage},
    ),
    Operation(method="GET", path="/v1/sweeps/{sweep_id}", summary="Read a sweep", answers={200: Sweep}),
    Operation(
        method="POST",
        path="/v1/sweeps/{sweep_id}/extend",
        summary="Add prompts, adapters and seeds: only what is missing runs",
        body=ExtensionRequest,
        answers={200: Sweep},
        refusals=(409,),
    ),
    Operation(
        method="GET",
        path="/v1/sweeps/{sweep_id}/diff",
        summary="Compare columns of two sweeps, or of one, over the prompts that both have",
        query=_DIFF_QUERY,
        answers={200: Diff},
        refusals=(409,),
    ),
    Operation(
        method="GET",
        path="/v1/sweeps/{sweep_id}/report",
        summary="Read a sweep's report, an adapter a column",
        answers={200: Report},
    ),
]
_KEYS = [
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
            Parameter("before", "The key from which to go on, as `next` gave it.", _TEXT, "mk_0123456789abcdef"),
            _count(1_000, 1_000),
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
_WEBHOOKS = [
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
        query=(_count(1_000, 100),),
        answers={200: DeliveryList},
    ),
]
_REST = [
    Operation(
        method="DELETE",
        path="/v1/tenant",
        summary="Close the caller's tenant, and delete it after some days",
        query=(Parameter("confirm", "The tenant's name.", _TEXT, "acme"),),
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
            _count(1_000, 100),
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
_FILE_FORM: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["file", "purpose"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "const": "batch"},
            "expires_after[anchor]": {"type": "string", "const": "created_at"},
            "expires_after[seconds]": {"type": "string", "pattern": "^[0-9]{4,7}$"},
        },
    },
    "example": {"file": "the file's bytes", "purpose": "batch"},
}
_AFTER_FILE, _AFTER_BATCH = (
    Parameter("after", "The id from which to go on, as `last_id` gave it.", _TEXT, f"{kind}_" + "0193f5c2a1b47d3e" * 2)
    for kind in ("file", "batch")
)
_BYTES = {"application/octet-stream": '{"custom_id":"row-1","response":{"status_code":200}}\n'}
_EVENTS = {"text/event-stream": 'data: {"object":"text_completion"}\n\ndata: [DONE]\n\n'}
_OPENAI = [
    Operation(
        method="POST",
        path="/openai/v1/files",
        summary="Upload a file of requests, a line each",
        other_bodies={"multipart/form-data": _FILE_FORM},
        answers={200: File},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/openai/v1/files",
        summary="List files",
        query=(
            _AFTER_FILE,
            _count(10_000, 10_000),
            Parameter("order", "By the time of creation.", {"type": "string", "enum": ["asc", "desc"]}, "asc"),
            Parameter("purpose", "Files of this purpose alone.", _TEXT, "batch_output"),
        ),
        answers={200: FilePage},
    ),
    Operation(method="GET", path="/openai/v1/files/{file_id}", summary="Read about a file", answers={200: File}),
    Operation(
        method="GET",
        path="/openai/v1/files/{file_id}/content",
        summary="Read a file's bytes, or with `Range` some of them",
        answers={200: None, 206: None},
        other_answers=_BYTES,
        refusals=(416,),
    ),
    Operation(method="DELETE", path="/openai/v1/files/{file_id}", summary="Delete a file", answers={200: Deleted}),
    Operation(
        method="POST",
        path="/openai/v1/batches",
        summary="Run a file of requests as a batch",
        body=OpenAIBatchBody,
        answers={200: OpenAIBatch},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/openai/v1/batches",
        summary="List batches that were made from files",
        query=(_AFTER_BATCH, _count(100, 20)),
        answers={200: OpenAIBatchPage},
    ),
    Operation(
        method="GET",
        path="/openai/v1/batches/{batch_id}",
        summary="Read a batch that was made from a file",
        answers={200: OpenAIBatch},
    ),
    Operation(
        method="POST",
        path="/openai/v1/batches/{batch_id}/cancel",
        summary="Cancel what has not ended of a batch",
        answers={200: OpenAIBatch},
        refusals=(409,),
    ),
    Operation(method="GET", path="/openai/v1/models", summary="List what a model may be", answers={200: ModelList}),
    Operation(method="GET", path="/openai/v1/models/{model}", summary="Read about a model", answers={200: Model}),
    *(
        Operation(
            method="POST",
            path=f"/openai{path}",
            summary=summary,
            body=body,
            answers={200: answer},
            other_answers=_EVENTS,
            refusals=(409, 500, 504),
            creates=True,
        )
        for path, summary, body, answer in (
            (COMPLETIONS, "Complete prompts, and wait for it", CompletionBody, TextCompletion),
            (CHAT, "Answer a chat, and wait for it", ChatBody, ChatCompletion),
        )
    ),
]
OPERATIONS: tuple[Operation, ...] = (
    *_OPEN,
    *_JOBS,
    *_BATCHES,
    *_ADAPTERS,
    *_SWEEPS,
    *_KEYS,
    *_WEBHOOKS,
    *_REST,
    *(dataclasses.replace(operation, refusal=OpenAIErrorBody) for operation in _OPENAI),
)
