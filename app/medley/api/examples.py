"""An example of each body and each answer, for the OpenAPI document; a test validates them against their schemas."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from medley.api.audit import Entry
from medley.api.batch_changes import ChangeBody, RetryBody
from medley.api.diffs import Diff
from medley.api.errors import ErrorBody, ErrorDetail
from medley.api.grants import GrantBody
from medley.api.job_bodies import SingleJob
from medley.api.keys import Key, KeyBody, RotationBody
from medley.api.openai.batches import OpenAIBatchBody
from medley.api.openai.bodies import ChatBody, CompletionBody
from medley.api.openai.choices import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    CompletionUsage,
    TextChoice,
    TextCompletion,
)
from medley.api.openai.errors import OpenAIErrorBody, error_of
from medley.api.openai.logprobs import TextLogprobs
from medley.api.openai.shapes import BatchUsage, Deleted, File, Model, OpenAIBatch, RequestCounts
from medley.api.operations.adapters import AdapterPage, GrantList
from medley.api.operations.jobs import BatchAdapterList, BatchPage, BatchRequest, ResultPage
from medley.api.operations.openai import FilePage, ModelList, OpenAIBatchPage
from medley.api.operations.sweeps import SweepPage
from medley.api.operations.tenants import (
    AuditPage,
    KeyPage,
    LimitList,
    Live,
    QuotaUse,
    Ready,
    TenantEnd,
    TenantName,
    WorkerList,
    WorkerShape,
)
from medley.api.operations.webhooks import DeliveryList, WebhookList
from medley.api.reports import Report
from medley.api.shapes import (
    Adapter,
    AdapterCounts,
    AdapterGrant,
    Batch,
    BatchAdapter,
    Column,
    Counts,
    Job,
    JobResult,
    Result,
    Sweep,
    SweepShape,
    Usage,
)
from medley.api.sweep_bodies import ExtensionBody, SweepBody
from medley.api.usage import UsageReport, UsageRow
from medley.api.webhook_bodies import Delivery, RotateBody, Webhook, WebhookBody, WebhookChange
from medley.spec.errors import Fault
from medley.spec.paired import DiffColumn
from medley.spec.statistics import ReportColumn
from medley.spec.webhooks import Event

_AT = datetime(2030, 5, 1, 6, 30, tzinfo=UTC)
_HEX = "0193f5c2a1b47d3e8f6a5b4c3d2e1f00"
_USAGE = Usage(prompt_tokens=7, completion_tokens=3)
_COUNTS = Counts(total=2, queued_or_running=1, succeeded=1, failed=0, cancelled=0, expired=0, retried=0)

_job = Job(
    id=f"job_{_HEX}",
    batch_id=f"batch_{_HEX}",
    state="succeeded",
    custom_id="row-1",
    adapter="caesar-3",
    revision=f"rev_{_HEX}",
    attempt=1,
    created_at=_AT,
    finished_at=_AT,
    seq=1,
    retry_of=None,
    retried_by=None,
    result=JobResult(
        text="sodqhw",
        token_ids=[115, 111, 100],
        logprobs=[-0.01, -0.02, -0.01],
        finish_reason="stop",
        usage=_USAGE,
    ),
    error=None,
)
_status: dict[str, Any] = {
    "state": "running",
    "priority": "normal",
    "deadline_at": None,
    "created_at": _AT,
    "finished_at": None,
    "rate": 412.5,
    "expected_at": _AT,
    "is_late": False,
    "counts": _COUNTS,
    "usage": _USAGE,
    "last_seq": 1,
}
_batch = Batch(id=f"batch_{_HEX}", object="batch", name="nightly", sweep=None, **_status)
_sweep = Sweep(
    id=f"sweep_{_HEX}",
    object="sweep",
    name="nightly",
    sweep=SweepShape("nightly", 1, 2, 2),
    num_prompts=1,
    num_columns=2,
    num_expanded=2,
    columns=[Column("caesar-3", f"rev_{_HEX}"), Column(None, None)],
    **_status,
)
_result = Result(
    seq=1,
    id=f"job_{_HEX}",
    state="succeeded",
    custom_id="row-1",
    adapter="caesar-3",
    prompt_idx=None,
    seed=7,
    text="sodqhw",
    finish_reason="stop",
    usage=_USAGE,
    error=None,
    finished_at=_AT,
    retry_of=None,
    retried_by=None,
)
_batch_adapter = BatchAdapter(
    adapter="caesar-3",
    revision=f"rev_{_HEX}",
    counts=AdapterCounts(total=2, queued_or_running=0, succeeded=1, failed=1, cancelled=0, expired=0),
    usage=_USAGE,
    failures={"prompt_too_long": 1},
    rate=None,
    expected_at=None,
)
_adapter = Adapter(
    name="caesar-3",
    full_name="acme/caesar-3",
    revision=f"rev_{_HEX}",
    digest="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    max_rank=8,
    size_bytes=131_072,
    created_at=_AT,
    state="ready",
    num_revisions=1,
)
_grant = AdapterGrant(id=f"grant_{_HEX}", adapter="caesar-3", tenant="globex", revision=None, created_at=_AT)
_column = ReportColumn(
    adapter="caesar-3",
    ended=1,
    succeeded=1,
    unsuccessful=0,
    scored=1,
    correct=1,
    accuracy=1.0,
    low=0.21,
    high=1.0,
    base_scored=1,
    base_correct=0,
    base_accuracy=0.0,
    completion_tokens=3,
)
_diff_column = DiffColumn(
    adapter="caesar-3",
    with_adapter=None,
    prompts=40,
    pairs=40,
    accuracy=0.9,
    with_accuracy=0.7,
    difference=0.2,
    low=0.05,
    high=0.35,
    wins=10,
    losses=2,
    ties=28,
    only_correct=10,
    only_with_correct=2,
    p=0.0386,
    p_adjusted=0.0386,
)
_used = UsageRow(day=_AT.date(), num_jobs=2, prompt_tokens=7, completion_tokens=3)
_webhook = Webhook(
    id=f"wh_{_HEX}",
    url="https://example.com/hook",
    events=[Event.BATCH_FINISHED, Event.SWEEP_FINISHED],
    description=None,
    batch_id=None,
    failed_jobs=None,
    state="enabled",
    disabled_at=None,
    disabled_reason=None,
    created_at=_AT,
    num_pending=0,
    previous_secret_until=None,
)
_delivery = Delivery(
    id=f"msg_{_HEX}",
    event="ping",
    state="delivered",
    attempt=1,
    next_attempt_at=None,
    status=204,
    error=None,
    created_at=_AT,
    ended_at=_AT,
    payload={"type": "ping", "timestamp": _AT, "data": {"id": f"wh_{_HEX}", "object": "webhook"}},
)
_key = Key(
    id="mk_0123456789abcdef",
    name="ci",
    scopes=["read", "submit"],
    state="live",
    created_at=_AT,
    expires_at=None,
    revoked_at=None,
    last_used_at=None,
    replaces=None,
)
_entry = Entry(
    number=7,
    at=_AT,
    key_id="mk_0123456789abcdef",
    action="key.revoke",
    object="mk_fedcba9876543210",
    details={},
    request_id="req_1",
    client_address="192.0.2.7",
)
_FAULT = Fault(field="max_tokens", got="0", wanted="1 to 32768")
_file = File(
    id=f"file_{_HEX}",
    bytes=140,
    created_at=1_904_000_000,
    expires_at=1_906_592_000,
    filename="prompts.jsonl",
    purpose="batch",
)
_openai_batch = OpenAIBatch(
    id=f"batch_{_HEX}",
    endpoint="/v1/completions",
    model="caesar-3",
    errors=None,
    input_file_id=_file.id,
    completion_window="24h",
    status="in_progress",
    output_file_id=None,
    error_file_id=None,
    created_at=1_904_000_000,
    in_progress_at=1_904_000_001,
    expires_at=1_904_086_400,
    finalizing_at=None,
    completed_at=None,
    failed_at=None,
    expired_at=None,
    cancelling_at=None,
    cancelled_at=None,
    request_counts=RequestCounts(2, 1, 0),
    usage=BatchUsage(7, 3, 10, {"cached_tokens": 0}, {"reasoning_tokens": 0}),
    metadata={"run": "nightly"},
)
_base_model = Model(id="llama", created=0, owned_by="medley", root="llama", parent=None)
_model = Model(
    id="caesar-3", created=1_904_000_000, owned_by="acme", root=f"caesar-3@rev_{_HEX}", parent=_base_model.id
)
_openai_usage = CompletionUsage(7, 3, 10)
_shown = TextLogprobs(["s", "o"], [-0.1, -0.2], [{"s": -0.1, "t": -2.5}, {"o": -0.2, "a": -2.0}], [0, 1])
_prompt = {"prompt": "planet=", "expected": "sodqhw"}
_values: dict[Any, Any] = {
    ErrorBody: ErrorBody(
        ErrorDetail(
            "invalid_request",
            "1 fault in the request; nothing was done",
            (_FAULT,),
        )
    ),
    Live: Live(True),
    Ready: Ready(True, True, True, True),
    TenantName: TenantName("acme", 30),
    TenantEnd: TenantEnd("acme", _AT),
    KeyBody: {"name": "ci", "scopes": ["read", "submit"]},
    RotationBody: {"old_lives_s": 86_400},
    Key: _key,
    KeyPage: KeyPage([_key], None),
    LimitList: LimitList("acme", {"adapters": QuotaUse(10_000, 2)}, {"max_prompt_bytes": 1_048_576}),
    AuditPage: AuditPage([_entry], None),
    SingleJob: {"prompt": "planet=", "adapter": "caesar-3", "max_tokens": 16, "stop": ["\n"]},
    Job: _job,
    BatchRequest: {
        "jobs": [{"prompt": "planet=", "custom_id": "row-1"}, {"prompt": "star=", "adapter": None}],
        "name": "nightly",
        "defaults": {"adapter": "caesar-3", "max_tokens": 16},
    },
    Batch: _batch,
    BatchPage: BatchPage([_batch], None),
    ResultPage: ResultPage([_result], 1, False),
    ChangeBody: {"priority": "high", "deadline_at": None},
    RetryBody: {"states": ["failed", "expired"], "codes": "retryable"},
    BatchAdapterList: BatchAdapterList(_batch, [_batch_adapter]),
    Adapter: _adapter,
    AdapterPage: AdapterPage([_adapter], None),
    GrantBody: GrantBody(tenant="globex"),
    AdapterGrant: _grant,
    GrantList: GrantList([_grant]),
    SweepBody: {"name": "nightly", "prompts": [_prompt], "adapters": ["acme/*"], "include_base": True},
    Sweep: _sweep,
    SweepPage: SweepPage([_sweep], None),
    Report: Report(_sweep, [_column]),
    ExtensionBody: {"prompts": [_prompt], "adapters": ["acme/new-*"], "seeds": [2]},
    Diff: Diff(f"sweep_{_HEX}", f"sweep_{_HEX}", 0, 2_000, [_diff_column]),
    UsageReport: UsageReport(_AT.date(), _AT.date(), "day", [_used], _used),
    WebhookBody: {"url": "https://example.com/hook", "events": ["batch.failing"], "failed_jobs": 10},
    WebhookChange: {"enabled": True},
    RotateBody: {"overlap_s": 3600},
    Webhook: _webhook,
    WebhookList: WebhookList([_webhook]),
    Delivery: _delivery,
    DeliveryList: DeliveryList([_delivery]),
    OpenAIErrorBody: OpenAIErrorBody(error_of(400, "invalid_request", "1 fault in the request", (_FAULT,))),
    File: _file,
    FilePage: FilePage([_file], False, _file.id, _file.id, "list"),
    Deleted: Deleted(_file.id, "file"),
    OpenAIBatchBody: {
        "input_file_id": _file.id,
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"run": "nightly"},
    },
    OpenAIBatch: _openai_batch,
    OpenAIBatchPage: OpenAIBatchPage([_openai_batch], False, _openai_batch.id, _openai_batch.id, "list"),
    Model: _model,
    ModelList: ModelList([_base_model, _model], "list"),
    CompletionBody: {"model": "caesar-3", "prompt": "planet=", "max_tokens": 16, "logprobs": 2, "stop": ["\n"]},
    TextCompletion: TextCompletion(
        f"cmpl-{_HEX}", 1_904_000_000, "caesar-3", [TextChoice(0, "so", "stop", _shown)], _openai_usage
    ),
    ChatBody: {"model": "caesar-3", "messages": [{"role": "user", "content": "planet"}], "max_tokens": 16},
    ChatCompletion: ChatCompletion(
        f"chatcmpl-{_HEX}", 1_904_000_000, "caesar-3", [ChatChoice(0, ChatMessage("sodqhw"), "stop")], _openai_usage
    ),
    WorkerList: WorkerList([WorkerShape(f"worker_{_HEX}", "active", "active", 64, 2, 5, {"steps": 1000})]),
}
EXAMPLES: dict[Any, Any] = {kind: msgspec.to_builtins(value) for kind, value in _values.items()}
