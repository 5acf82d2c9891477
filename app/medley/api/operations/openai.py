"""Operations of the OpenAI-compatible interface: /openai/v1. What they refuse, they refuse in its own shape."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec

from medley.api.openai.batches import OpenAIBatchBody
from medley.api.openai.bodies import ChatBody, CompletionBody
from medley.api.openai.choices import ChatCompletion, TextCompletion
from medley.api.openai.errors import OpenAIErrorBody
from medley.api.openai.requests import CHAT, COMPLETIONS
from medley.api.openai.shapes import Deleted, File, Model, OpenAIBatch
from medley.api.openapi import Operation, Parameter
from medley.api.operations.parameters import TEXT, most


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
    Parameter("after", "The id from which to go on, as `last_id` gave it.", TEXT, f"{kind}_" + "0193f5c2a1b47d3e" * 2)
    for kind in ("file", "batch")
)
_BYTES = {"application/octet-stream": '{"custom_id":"row-1","response":{"status_code":200}}\n'}
_EVENTS = {"text/event-stream": 'data: {"object":"text_completion"}\n\ndata: [DONE]\n\n'}

_OPERATIONS = [
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
            most(10_000, 10_000),
            Parameter("order", "By the time of creation.", {"type": "string", "enum": ["asc", "desc"]}, "asc"),
            Parameter("purpose", "Files of this purpose alone.", TEXT, "batch_output"),
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
        query=(_AFTER_BATCH, most(100, 20)),
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

OPENAI = [dataclasses.replace(operation, refusal=OpenAIErrorBody) for operation in _OPERATIONS]
