"""Operations on jobs and batches: /v1/jobs and /v1/batches."""

from __future__ import annotations

from typing import Any

import msgspec

from medley.api.batch_changes import ChangeBody, RetryBody
from medley.api.job_bodies import At, Defaults, JobBody, Priority, SingleJob
from medley.api.openapi import Operation, Parameter
from medley.api.operations.parameters import BEFORE, TEXT, WAIT, most
from medley.api.shapes import NDJSON, Batch, BatchAdapter, Job, Result


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Jobs that are made together, all or none. What `defaults` has, each job may leave out."""

    jobs: list[JobBody]
    name: str | None = None
    priority: Priority = "normal"
    deadline_at: At | None = None
    defaults: Defaults = msgspec.UNSET


class BatchPage(msgspec.Struct):
    """Batches, newest first. `next`: what `before` is for the next page, null on the last."""

    batches: list[Batch]
    next: str | None


class BatchAdapterList(msgspec.Struct):
    """A batch, and what it has for each adapter; the base last."""

    batch: Batch
    adapters: list[BatchAdapter]


class ResultPage(msgspec.Struct):
    """What has ended since `after`. `next`: what `after` is next; `finished`: nothing more will come."""

    results: list[Result]
    next: int
    finished: bool


_OF_LINES = (
    Parameter("name", "Of a file of lines: the batch's name.", TEXT, "nightly"),
    Parameter("priority", "Of a file of lines.", {"type": "string", "enum": ["low", "normal", "high"]}, "low"),
    Parameter("deadline_at", "Of a file of lines.", {"type": "string", "format": "date-time"}, "2031-05-01T06:00:00Z"),
    Parameter("defaults", "Of a file of lines: JSON, as `defaults` of a body.", TEXT, '{"max_tokens":16}'),
)
_RESULTS_QUERY = (
    Parameter("after", "The last `seq` that was read.", {"type": "integer", "minimum": 0, "default": 0}, 0),
    most(10_000, 1_000),
    WAIT,
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

_LINES: dict[str, Any] = {"schema": {"type": "string"}, "example": '{"prompt":"planet=","adapter":"caesar-3"}\n'}

_RESULT_LINES = {NDJSON: '{"seq":1,"id":"job_0193f5c2a1b47d3e8f6a5b4c3d2e1f00","state":"succeeded"}\n'}


JOBS = [
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
        query=(WAIT,),
        answers={200: Job},
    ),
    Operation(method="POST", path="/v1/jobs/{job_id}/cancel", summary="Cancel a job", answers={200: Job}),
]
BATCHES = [
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
        query=(BEFORE, most(1_000, 100)),
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
