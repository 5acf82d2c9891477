"""/openapi.json, made from the table of operations and the types that requests and answers have; /docs shows it.

Owns what OpenAPI looks like and the page. What an operation takes and answers stands in `operations`, its examples in
`examples`. The page fetches nothing from elsewhere: its scripts and styles are served from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Response

from medley.api.auth import anyone
from medley.api.errors import ErrorBody, NotFound
from medley.version import version

JSON = "application/json"
_REF = "#/components/schemas/{name}"
_DESCRIPTION = (
    "Batch inference for many LoRA adapters on one base model. A request is authorised by `Authorization: Bearer"
    " mk_...`. A create takes an `Idempotency-Key`: sent again with the same key it makes nothing new. What is wrong"
    " with a request is said all at once, and then nothing was done; another tenant's things do not exist."
)
# What any request may be answered.
_REFUSALS = {
    400: "The request has faults; all of them are listed and nothing was done.",
    401: "No valid API key.",
    403: "The key lacks the scope that is wanted, or the tenant is being deleted.",
    404: "There is no such thing, or it is another tenant's.",
    409: "A name or an idempotency key is taken by something else.",
    413: "The body, or something in it, is over its limit.",
    415: "The body is compressed.",
    416: "The range that is asked for is not in the file.",
    429: "Too many requests, or a quota is used up; try again after `Retry-After` seconds.",
    500: "A job of the request failed for a fault of the service's own.",
    503: "The service cannot answer now; try again after `Retry-After` seconds.",
    504: "The request's jobs did not end in time.",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a query. `schema` is JSON Schema."""

    name: str
    description: str
    schema: Mapping[str, Any]
    example: Any


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: what it takes and what it answers where all is well.

    `answers`: status -> the type of its JSON, or None where it has none. `body`: the type of its JSON.
    `other_bodies`, `other_answers`: media type -> what it holds. `refusals`: statuses it may answer beside those that
    any operation may, and `refusal` what they hold. is_open: it wants no key. creates: it takes an idempotency key.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[int, Any]
    query: tuple[Parameter, ...] = ()
    body: Any = None
    other_bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    other_answers: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    refusal: Any = ErrorBody
    is_open: bool = False
    creates: bool = False


def document(
    operations: Iterable[Operation], paths: Mapping[str, tuple[str, Any]], examples: Mapping[Any, Any]
) -> dict[str, Any]:
    """The OpenAPI document. `paths`: what stands for each name in a path, and an example. `examples`: by type."""
    operations = list(operations)
    types = {kind for op in operations for kind in (op.refusal, op.body, *op.answers.values())} - {None}
    ordered = sorted(types, key=lambda kind: str(kind.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    writer = _Writer(dict(zip(ordered, schemas, strict=True)), paths, examples)
    found: dict[str, Any] = {}
    for operation in operations:
        found.setdefault(operation.path, {})[operation.method.lower()] = writer.operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Medley", "version": version(), "description": _DESCRIPTION},
        "paths": found,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key: mk_..."}},
        },
        "security": [{"key": []}],
    }


class _Writer:
    def __init__(
        self, schemas: Mapping[Any, dict[str, Any]], paths: Mapping[str, tuple[str, Any]], examples: Mapping[Any, Any]
    ) -> None:
        self._schemas, self._paths, self._examples = schemas, paths, examples

    def operation(self, operation: Operation) -> dict[str, Any]:
        made: dict[str, Any] = {
            "operationId": _operation_id(operation),
            "tags": [operation.path.removeprefix("/v1").split("/")[1]],
            "summary": operation.summary,
            "parameters": self._parameters(operation),
            "responses": self._responses(operation),
        }
        if operation.body is not None or operation.other_bodies:
            content = {kind: dict(media) for kind, media in operation.other_bodies.items()}
            if operation.body is not None:
                content = {JSON: self._media(operation.body)} | content
            made["requestBody"] = {"required": True, "content": content}
        if operation.is_open:
            made["security"] = []
        return made

    def _parameters(self, operation: Operation) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for name in re.findall(r"\{(\w+)\}", operation.path):
            description, example = self._paths[name]
            made.append(_parameter("path", name, description, {"type": "string", "minLength": 1}, example))
        made += [_parameter("query", p.name, p.description, p.schema, p.example) for p in operation.query]
        if operation.creates:
            text = "The same key with the same request makes one thing, however often it is sent."
            schema = {"type": "string", "pattern": "^[!-~]{1,200}$"}
            made.append(_parameter("header", "Idempotency-Key", text, schema, "5f2b8c1e-nightly-7"))
        return made

    def _responses(self, operation: Operation) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for status, kind in operation.answers.items():
            made[str(status)] = {"description": "Done." if kind is None else (kind.__doc__ or "").split("\n")[0]}
            content = {} if kind is None else {JSON: self._media(kind)}
            content |= {
                media: {"schema": {"type": "string"}, "example": text}
                for media, text in operation.other_answers.items()
            }
            if content:
                made[str(status)]["content"] = content
        common = () if operation.is_open else (400, 401, 404, 413, 415, 429, 503)
        for status in sorted({*common, *operation.refusals}):
            content = {JSON: self._media(operation.refusal)}
            made.setdefault(str(status), {"description": _REFUSALS[status], "content": content})
        return made

    def _media(self, kind: Any) -> dict[str, Any]:
        return {"schema": self._schemas[kind], "example": self._examples[kind]}


def _parameter(where: str, name: str, description: str, schema: Mapping[str, Any], example: Any) -> dict[str, Any]:
    made = {"name": name, "in": where, "description": description, "schema": dict(schema), "example": example}
    return made | {"required": True} if where == "path" else made


def _operation_id(operation: Operation) -> str:
    """`POST /v1/jobs/{job_id}/cancel` is `post_jobs_job_id_cancel`."""
    words = re.findall(r"\w+", operation.path.removeprefix("/v1"))
    return "_".join([operation.method.lower(), *words])


@cache
def _served() -> bytes:
    from medley.api.examples import EXAMPLES
    from medley.api.operations import OPERATIONS
    from medley.api.operations.parameters import PATH_PARAMETERS

    return msgspec.json.encode(document(OPERATIONS, PATH_PARAMETERS, EXAMPLES))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Medley</title>
<link rel="icon" href="/docs/favicon.png"><link rel="stylesheet" href="/docs/swagger-ui.css"></head>
<body><div id="page"></div><script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body></html>
"""
_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null});\n'
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/openapi.json", dependencies=[Depends(anyone)])
async def openapi() -> Response:
    return Response(_served(), media_type=JSON)


@router.get("/docs", dependencies=[Depends(anyone)])
async def docs() -> Response:
    return Response(_PAGE, headers=_PAGE_HEADERS, media_type="text/html")


@router.get("/docs/{name}", dependencies=[Depends(anyone)])
async def asset(name: str) -> Response:
    if name == "start.js":
        return Response(_START, headers=_PAGE_HEADERS, media_type="text/javascript")
    if name not in _ASSETS:
        raise NotFound("page", name)
    data = (resources.files("fastapi_offline") / "static" / name).read_bytes()
    return Response(data, headers={**_PAGE_HEADERS, "Cache-Control": "max-age=86400"}, media_type=_ASSETS[name])
