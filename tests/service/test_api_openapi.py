"""The OpenAPI document: every route with examples that validate; requests made from it find no fault and no secret."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from api_server import Api, adapter_files
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from openai_service import Serving, client_of, close_clients, completion_line, create, finish_queued, make_tasks
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from medley.api.app import ROUTERS
from medley.api.examples import EXAMPLES
from medley.api.openapi import document
from medley.api.operations import OPERATIONS
from medley.api.operations.parameters import PATH_PARAMETERS
from medley.config import Limits

LIMITS = Limits(max_body_bytes=1 << 20, max_adapter_bytes=1 << 20)
SECRET = "a-secret-of-the-victim"
MAX_EXAMPLES = 12  # of each operation and kind of body

DOCUMENT: dict[str, Any] = json.loads(json.dumps(document(OPERATIONS, PATH_PARAMETERS, EXAMPLES)))


def test_every_route_is_documented_and_nothing_else_is() -> None:
    routes = {
        (method, route.path.replace(":path}", "}"))
        for module in ROUTERS
        for route in module.router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }
    assert {(operation.method, operation.path) for operation in OPERATIONS} == routes
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def examples() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(where, schema, example) of each body, answer and parameter."""
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            at = f"{method} {path}"
            for parameter in operation["parameters"]:
                yield f"{at} {parameter['name']}", parameter["schema"], parameter["example"]
            contents = {"body": operation.get("requestBody", {}).get("content", {})}
            contents |= {status: answer.get("content", {}) for status, answer in operation["responses"].items()}
            for where, content in contents.items():
                for kind, media in content.items():
                    yield f"{at} {where} {kind}", media["schema"], media["example"]


@pytest.mark.parametrize(("schema", "example"), [pytest.param(s, e, id=at) for at, s, e in examples()])
def test_each_example_validates(schema: dict[str, Any], example: Any) -> None:
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema_rs.validator_for(whole).validate(example)


def test_every_answer_and_parameter_says_what_it_is() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert all(parameter["description"] for parameter in operation["parameters"]), path
            assert all(answer["description"] for answer in operation["responses"].values()), path


def test_the_service_shows_it_and_fetches_nothing_from_elsewhere(api: Api) -> None:
    served = api.anonymous.get("/openapi.json")
    assert (served.status_code, served.json()) == (200, DOCUMENT)
    page = api.anonymous.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 4
    for link in links:
        assert link.startswith("/docs/")
        asset = api.anonymous.get(link)
        assert (asset.status_code, bool(asset.content)) == (200, True), link
    assert "http" not in api.anonymous.get("/docs/start.js").text
    assert api.anonymous.get("/docs/..%2f..%2fsecret").status_code == 404


@pytest.fixture(scope="module")
def victim(api: Api) -> dict[str, str]:
    """Ids of what another tenant has, all of which holds a secret."""
    client = api.as_tenant("victim")
    body = {"prompt": SECRET, "custom_id": SECRET}
    client.put(f"/v1/adapters/{SECRET}", files=adapter_files())
    job = client.post("/v1/jobs", json={**body, "adapter": SECRET}).json()
    client.post("/v1/batches", json={"jobs": [body], "name": SECRET})
    line = completion_line(SECRET, prompt=SECRET)
    theirs = client_of(api, "victim")
    batch = create(theirs, [line], metadata={"name": SECRET})
    make_tasks(api).look()
    finish_queued(api, text=SECRET)
    make_tasks(api).look()
    file = theirs.batches.retrieve(batch.id).output_file_id
    close_clients()
    sweep = client.post("/v1/sweeps", json={"name": SECRET, "prompts": [SECRET], "adapters": [SECRET]}).json()
    key = client.post("/v1/keys", json={"name": SECRET}).json()
    webhook = {"url": "https://example.com", "events": ["batch.finished"], "description": SECRET}
    webhook = client.post("/v1/webhooks", json=webhook).json()
    return {
        "key_id": key["id"],
        "webhook_id": webhook["id"],
        "job_id": job["id"],
        "batch_id": batch.id,
        "file_id": file,
        "model": SECRET,
        "sweep_id": sweep["id"],
        "name": SECRET,
        "owner": "victim",
        "tenant": "victim",
    }


SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
FUZZED = [found.ok() for found in SCHEMA.get_all_operations()]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("operation", FUZZED, ids=lambda operation: operation.label)
def test_requests_made_from_it_are_answered_as_it_says_and_show_nothing_of_others(
    api: Api, victim: dict[str, str], operation: Any
) -> None:
    mallory, eve = api.key("mallory"), api.key("eve")

    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def fuzz(case: Any) -> None:
        for key in (mallory, eve):
            headers = {**dict(case.headers or {}), "Authorization": f"Bearer {key}"}
            response = case.call(base_url=api.url, headers=headers, timeout=30)
            case.validate_response(response, checks=CHECKS)
            # A refusal may repeat what the caller said.
            assert SECRET not in response.text or (SECRET in str(case.path_parameters) and response.status_code >= 400)
            case.path_parameters = {name: victim[name] for name in case.path_parameters}

    # Completions are answered once their jobs have ended.
    with Serving(api) if "completions" in operation.path else nullcontext():
        fuzz()


def test_all_that_belongs_to_another_is_not_found(api: Api, victim: dict[str, str]) -> None:
    client = api.as_tenant("mallory")
    for operation in OPERATIONS:
        names = re.findall(r"\{(\w+)\}", operation.path)
        if not names or operation.method == "PUT":
            continue
        body = {"tenant": "eve"} if operation.path.endswith("/grants") and operation.method == "POST" else None
        response = client.request(operation.method, operation.path.format(**victim), json=body)
        assert response.status_code == 404, (operation.method, operation.path)
        unknown = {name: value.replace("0", "1") + "x" for name, value in victim.items()}
        stranger = client.request(operation.method, operation.path.format(**unknown), json=body)
        assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, response.json()["error"]["code"])
