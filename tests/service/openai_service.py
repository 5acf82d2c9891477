"""The rest of a service for tests of the OpenAI interface: their client, the batch task, workers that answer."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from api_server import Api
from background import LOOK_S, Background
from sqlalchemy import text

from medley.api.openai.requests import RequestReader
from medley.api.openai.tokens import TokenTexts
from medley.db.quotas import set_limits
from medley.objects import Objects
from medley.spec.ids import BATCH, public_id
from medley.tasks.finalize import Finalizer
from medley.tasks.openai_batches import OpenAIBatches
from medley.tasks.validate import Validator

WAIT_S = 120.0  # the first batch of a service also waits for an engine that starts


_clients: dict[tuple[str, str], openai.OpenAI] = {}


def client_of(api: Api, tenant: str | None = None) -> openai.OpenAI:
    """Their client with a key of the tenant; it tries nothing again. The test ends with `close_clients`."""
    key = api.as_tenant(tenant).headers["Authorization"].removeprefix("Bearer ")
    if (api.url, key) not in _clients:
        made = openai.OpenAI(base_url=f"{api.url}/openai/v1", api_key=key, max_retries=0, timeout=60)
        _clients[api.url, key] = made
    return _clients[api.url, key]


def limited_client(api: Api, **limits: float) -> openai.OpenAI:
    """Their client with a key of a new default tenant, who has these limits."""
    name = api.take_new_tenant()
    client = client_of(api)
    tenant = api.tenant_id(name)
    api.owner(lambda conn: set_limits(conn, tenant, limits))
    return client


def close_clients() -> None:
    while _clients:
        _clients.popitem()[1].close()


def make_tasks(api: Api) -> OpenAIBatches:
    """The batch task as its process makes it."""
    settings, engine = api.settings, api.ledger.work
    objects = Objects.open(settings.store_url)
    validator = Validator(engine, objects, api.ringer, RequestReader.open(settings), settings)
    finalizer = Finalizer(engine, objects, api.ringer, TokenTexts.open(settings), settings.base_name)
    return OpenAIBatches(engine, settings.pool, validator, finalizer)


class Serving(Background):
    """Within the block batches are stepped, and every queued job ends soon, as `fields` say (text, state, ...)."""

    def __init__(self, api: Api, **fields: Any) -> None:
        super().__init__(self._serve)
        self._api = api
        self._fields = fields
        self._tasks = make_tasks(api)

    def _serve(self) -> None:
        self._tasks.look()
        finish_queued(self._api, **self._fields)


def finish_queued(api: Api, **fields: Any) -> None:
    """A fake worker claims and completes what is queued now."""
    statement = text("SELECT DISTINCT batch_id FROM jobs WHERE pool = :pool AND state = 'queued' AND NOT is_held")
    with api.ledger.working() as conn:
        waiting = list(conn.execute(statement, {"pool": api.ledger.pool}).scalars())
    for batch in waiting:
        api.finish(public_id(BATCH, batch), **fields)


def completion_line(custom_id: str, model: str = "model", prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def upload(client: openai.OpenAI, lines: list[Any] | bytes, **options: Any) -> str:
    """The id of a file of lines, which are JSON unless they are bytes."""
    data = lines if isinstance(lines, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return client.files.create(file=("input.jsonl", data), purpose="batch", **options).id


def create(client: openai.OpenAI, lines: list[Any] | bytes, **options: Any) -> Any:
    """A batch of completions over these lines."""
    options = {"endpoint": "/v1/completions", "completion_window": "24h", **options}
    return client.batches.create(input_file_id=upload(client, lines), **options)


def wait_for(client: openai.OpenAI, batch_id: str, *states: str) -> Any:
    """The batch once it is in one of `states`."""
    deadline = time.monotonic() + WAIT_S
    while (batch := client.batches.retrieve(batch_id)).status not in states:
        assert time.monotonic() < deadline, f"still {batch.status}"
        time.sleep(LOOK_S)
    return batch


def read_lines(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The objects in an output or error file."""
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
