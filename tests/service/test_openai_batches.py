"""OpenAI batches by the real `openai` client: made from files, validated, run, finalised, cancelled, expired."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import Api, uuid_of
from openai_service import (
    Serving,
    client_of,
    close_clients,
    completion_line,
    create,
    finish_queued,
    limited_client,
    make_tasks,
    read_lines,
    upload,
    wait_for,
)
from sqlalchemy import text

from medley.config import Limits
from medley.db import openai_batches
from medley.db.flags import expire_queued
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

LIMITS = Limits(max_body_bytes=2 << 20, max_prompt_bytes=1000, max_jobs_per_request=100)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


def test_a_file_of_requests_on_the_base_and_on_adapters_becomes_an_output_file_in_its_order(api: Api) -> None:
    client = client_of(api)
    for name in ("add", "upper"):
        assert api.upload(name).status_code == 201
    revision = api.as_tenant().get("/v1/adapters/add").json()["revision"]
    models = ["model", "add", f"add@{revision}", f"{api.as_tenant().get('/v1/tenant').json()['name']}/upper"]
    lines = [completion_line(f"line-{i}", models[i % 4]) for i in range(12)]
    batch = create(client, lines, metadata={"run": "nightly"}, completion_window="48h")
    assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", "/v1/completions")
    assert (batch.metadata, batch.completion_window) == ({"run": "nightly"}, "48h")
    assert batch.expires_at - batch.created_at == 48 * 3600
    with Serving(api, text="done"):
        ended = wait_for(client, batch.id, "completed")
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (12, 12, 0)
    assert ended.usage.input_tokens == 36
    assert ended.usage.output_tokens == 24
    assert ended.usage.total_tokens == 60
    assert ended.error_file_id is None
    stamps = [ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at]
    assert stamps == sorted(stamps)
    assert (ended.failed_at, ended.expired_at, ended.cancelling_at, ended.cancelled_at) == (None,) * 4
    found = read_lines(client, ended.output_file_id)
    assert [line["custom_id"] for line in found] == [f"line-{i}" for i in range(12)]
    assert [line["response"]["body"]["model"] for line in found] == [models[i % 4] for i in range(12)]
    assert {line["response"]["status_code"] for line in found} == {200}
    assert {line["error"] for line in found} == {None}
    body = found[0]["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "done"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    output = client.files.retrieve(ended.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.bytes == len(client.files.content(output.id).content)
    assert api.as_tenant().get(f"/v1/batches/{batch.id}").json()["state"] == "finished", "the native API sees it too"
    api.ledger.check()


def test_every_fault_of_every_line_is_listed_and_nothing_runs(api: Api) -> None:
    client = client_of(api)
    good = completion_line("same")
    lines = [
        json.dumps(good),
        "{no json",
        json.dumps(good),
        json.dumps(completion_line("model", "nobody")),
        json.dumps({**completion_line("method"), "method": "GET", "url": "/v1/chat/completions"}),
        json.dumps({"custom_id": "bare"}),
        json.dumps(completion_line("", temperature=-1, max_tokens="x", colour=1, suffix="x")),
        "",
        json.dumps({**completion_line("nul\0"), "extra": 1}),
        json.dumps(completion_line("stream", stream=True, n=2000)),
    ]
    batch = create(client, "\n".join(lines).encode())
    make_tasks(api).look()
    failed = client.batches.retrieve(batch.id)
    assert (failed.status, failed.request_counts.total) == ("failed", 0)
    assert failed.failed_at is not None
    found = [(error.line, error.code, error.param) for error in failed.errors.data]
    assert found == [
        (2, "invalid_json_line", "body"),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "model_not_found", "body.model"),
        (5, "invalid_method", "method"),
        (5, "invalid_url", "url"),
        (6, "missing_required_parameter", "method"),
        (6, "missing_required_parameter", "url"),
        (6, "missing_required_parameter", "body"),
        (7, "invalid_custom_id", "custom_id"),
        (7, "invalid_value", "body.colour"),
        (7, "invalid_value", "body.max_tokens"),
        (7, "invalid_value", "body.suffix"),
        (7, "invalid_value", "body.temperature"),
        (9, "invalid_value", "extra"),
        (9, "invalid_custom_id", "custom_id"),
        (10, "invalid_value", "body.n"),
        (10, "invalid_value", "body.stream"),
    ]
    assert api.as_tenant().get(f"/v1/batches/{batch.id}").json()["state"] == "finished"
    assert [row for row in api.ledger.jobs().values() if row.batch_id == uuid_of(batch.id)] == []
    api.ledger.check()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n\n  \n", "empty_file"),
        (b"\x00\xff", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (b'{"custom_id": "' + b"x" * 600_000, "line_too_long"),
        (b"\n".join(json.dumps(completion_line(str(i), n=50)).encode() for i in range(3)), "too_many_requests"),
    ],
)
def test_a_hostile_file_fails_with_what_is_wrong_with_it(api: Api, data: bytes, code: str) -> None:
    client = client_of(api)
    batch = create(client, data)
    make_tasks(api).look()
    failed = client.batches.retrieve(batch.id)
    assert failed.status == "failed"
    assert [error.code for error in failed.errors.data] == [code]
    api.ledger.check()


def test_failed_requests_stand_in_the_error_file_and_the_others_in_the_output(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("good"), completion_line("bad", "model", [1, 2, 3])])
    make_tasks(api).look()
    api.finish(batch.id, 1)
    too_long = JobError(code=ErrorCode.PROMPT_TOO_LONG, message="prompt: got 9 tokens, wanted at most 8")
    api.finish(batch.id, 1, state=JobState.FAILED, text=None, num_tokens=0, error=too_long)
    make_tasks(api).look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 1, 1)
    (good,) = read_lines(client, ended.output_file_id)
    (bad,) = read_lines(client, ended.error_file_id)
    assert good["custom_id"] == "good"
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert bad["response"]["body"]["error"]["code"] == "context_length_exceeded"
    api.ledger.check()


def test_a_request_of_several_prompts_and_samples_is_one_line_and_its_prompts_count_once(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("many", prompt=["a", "b"], n=3, seed=7), completion_line("one")])
    tasks = make_tasks(api)
    tasks.look()
    live = client.batches.retrieve(batch.id)
    assert (live.status, live.request_counts.total, live.request_counts.completed) == ("in_progress", 2, 0)
    api.finish(batch.id, 6)
    assert client.batches.retrieve(batch.id).request_counts.completed == 1
    api.finish(batch.id)
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.request_counts.total, ended.request_counts.completed) == (2, 2)
    many, _ = read_lines(client, ended.output_file_id)
    assert [choice["index"] for choice in many["response"]["body"]["choices"]] == list(range(6))
    assert many["response"]["body"]["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert (ended.usage.input_tokens, ended.usage.output_tokens) == (9, 14)
    statement = text("SELECT prompt, seed FROM job_inputs WHERE batch_id = :id ORDER BY job_id LIMIT 6")
    with api.ledger.working() as conn:
        inputs = [tuple(row) for row in conn.execute(statement, {"id": uuid_of(batch.id)})]
    assert [prompt for prompt, _ in inputs] == ["a"] * 3 + ["b"] * 3
    seeds = [seed for _, seed in inputs]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert seeds[:3] == seeds[3:]
    api.ledger.check()


def test_a_cancel_keeps_what_has_finished_and_says_so_of_the_rest(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(5)])
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, 2)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at is not None
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert ended.status == "cancelled"
    assert ended.cancelled_at is not None
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (5, 2, 3)
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == ["0", "1"]
    errors = read_lines(client, ended.error_file_id)
    assert [(line["response"], line["error"]["code"]) for line in errors] == [(None, "batch_cancelled")] * 3
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    api.ledger.check()


def test_a_cancel_before_validation_ends_the_batch_without_jobs(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("1")])
    assert client.batches.cancel(batch.id).status == "cancelling"
    make_tasks(api).look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.output_file_id, ended.request_counts.total) == ("cancelled", None, 0)
    assert api.as_tenant().get(f"/v1/batches/{batch.id}").json()["state"] == "finished"
    api.ledger.check()


def test_a_cancel_while_lines_become_jobs_ends_the_others_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", 2)
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(6)])
    tasks = make_tasks(api)

    def cancel_once() -> None:
        found = client.batches.retrieve(batch.id)
        if found.status == "in_progress":
            api.finish(batch.id, 1)
            client.batches.cancel(batch.id)

    tasks._validator._on_chunk = cancel_once
    tasks.look()
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("cancelled", 1, 5)
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == ["0"]
    assert [line["custom_id"] for line in read_lines(client, ended.error_file_id)] == ["1", "2", "3", "4", "5"]
    assert api.as_tenant().get(f"/v1/batches/{batch.id}").json()["counts"]["cancelled"] == 5
    assert api.as_tenant().get("/v1/limits").json()["quotas"]["queued_jobs"]["used"] == 0
    api.ledger.recount()


def test_a_batch_paused_while_lines_become_jobs_is_counted_by_adapter_from_the_first(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", 3)
    client, native = client_of(api), api.as_tenant()
    assert api.upload("add").status_code == 201
    revision = native.get("/v1/adapters/add").json()["revision"]
    models = ("model", "add", f"add@{revision}")
    batch = create(client, [completion_line(str(i), models[i % 3], n=1 + i % 3) for i in range(9)])
    tasks = make_tasks(api)

    def lanes() -> dict[str | None, tuple[int, int]]:
        shown = native.get(f"/v1/batches/{batch.id}/adapters").json()["adapters"]
        return {a["adapter"]: (a["counts"]["total"], a["counts"]["queued_or_running"]) for a in shown}

    seen: list[Any] = []

    def pause() -> None:
        """After the first lines are jobs, some of which have run."""
        if client.batches.retrieve(batch.id).status != "in_progress":
            return
        if not seen:
            api.finish(batch.id, 2)
            assert native.post(f"/v1/batches/{batch.id}/pause").status_code == 200
        seen.append(lanes())
        api.ledger.recount()

    tasks._validator._on_chunk = pause
    tasks.look()
    assert len(seen) > 2, "it was paused in the middle"
    assert all({name: total for name, (total, _) in found.items()} == {None: 3, "add": 15} for found in seen)
    assert seen[0] == seen[-1] == lanes()
    assert sum(left for _, left in lanes().values()) == 16
    assert api.finish(batch.id) == [], "what was made while it was paused is held"
    assert not any(api.ledger.demand().values())
    assert native.post(f"/v1/batches/{batch.id}/resume").status_code == 200
    assert sum(api.ledger.demand().values()) == 16
    api.ledger.recount()
    with Serving(api, text="done"):
        ended = wait_for(client, batch.id, "completed")
    assert ended.request_counts.completed == 9
    assert lanes() == {None: (3, 0), "add": (15, 0)}
    api.ledger.recount()


def test_a_batch_whose_window_closes_is_expired_and_keeps_what_has_finished(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(3)], completion_window="1h")
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, 1)
    api.ledger.let_deadline_pass(uuid_of(batch.id))
    with api.ledger.working() as conn:
        expire_queued(conn)
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("expired", 1, 2)
    assert ended.expired_at is not None
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == ["0"]
    assert {line["error"]["code"] for line in read_lines(client, ended.error_file_id)} == {"batch_expired"}
    api.ledger.check()


def test_an_expansion_that_was_cut_goes_on_where_it_stood(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", 3)
    client = client_of(api)
    batch = create(client, [completion_line(f"line-{i}") for i in range(10)])
    tasks = make_tasks(api)
    chunks: list[None] = []
    tasks._validator._on_chunk = lambda: chunks.append(None)
    # One chunk while judging, one of jobs.
    tasks._should_stop = tasks._validator._should_stop = lambda: len(chunks) == 2
    tasks.run(uuid_of(batch.id))
    statement = text("SELECT custom_id FROM job_inputs WHERE batch_id = :id ORDER BY job_id")
    with api.ledger.working() as conn:
        assert len(conn.execute(statement, {"id": uuid_of(batch.id)}).all()) == 3
    make_tasks(api).look()
    with api.ledger.working() as conn:
        made = list(conn.execute(statement, {"id": uuid_of(batch.id)}).scalars())
    assert made == [f"line-{i}" for i in range(10)]
    finish_queued(api)
    make_tasks(api).look()
    assert client.batches.retrieve(batch.id).status == "completed"
    api.ledger.check()


def test_a_model_means_what_it_meant_when_the_batch_was_validated(api: Api) -> None:
    client = client_of(api)
    api.upload("mine")
    first = api.as_tenant().get("/v1/adapters/mine").json()["revision"]
    batch = create(client, [completion_line("1", "mine")])
    tasks = make_tasks(api)
    with api.ledger.working() as conn:
        row = openai_batches.take_step(conn, uuid_of(batch.id), api.ledger.pool)
    tasks._validator.validate(row)
    api.upload("mine", folder="upper")
    tasks.look()
    (job,) = [row for row in api.ledger.jobs().values() if row.batch_id == uuid_of(batch.id)]
    assert f"rev_{job.revision_id.hex}" == first
    finish_queued(api)
    tasks.look()
    api.ledger.check()


def test_another_tenants_adapter_is_no_model_and_his_files_and_batches_are_not_there(api: Api) -> None:
    ours = client_of(api)
    api.upload("secret")
    file = upload(ours, [completion_line("1", "secret")])
    batch = ours.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h")
    theirs = client_of(api, "stranger")
    for refused in (
        lambda: theirs.files.retrieve(file),
        lambda: theirs.files.content(file),
        lambda: theirs.files.delete(file),
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h"),
        lambda: theirs.models.retrieve("secret"),
    ):
        with pytest.raises(openai.NotFoundError):
            refused()
    assert list(theirs.files.list()) == []
    assert list(theirs.batches.list()) == []
    stolen = create(theirs, [completion_line("1", "secret")])
    make_tasks(api).look()
    assert [e.code for e in theirs.batches.retrieve(stolen.id).errors.data] == ["model_not_found"]
    assert ours.batches.retrieve(batch.id).status == "in_progress"
    finish_queued(api)
    make_tasks(api).look()
    api.ledger.check()


def test_batches_are_listed_newest_first_page_by_page(api: Api) -> None:
    client = client_of(api)
    made = [create(client, [completion_line("1")]).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:2:-1]
    assert page.has_more
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1], "their client turns the pages"
    with Serving(api):
        for batch in made:
            wait_for(client, batch, "completed")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1d"}, "completion_window"),
        ({"completion_window": "9999h"}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_a_batch_that_asks_for_what_there_is_not_is_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    client = client_of(api)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, [completion_line("1")], **fields)
    assert caught.value.param == param


def test_equal_creates_with_one_key_make_one_batch(api: Api) -> None:
    client = client_of(api)
    file = upload(client, [completion_line("1")])
    options: dict[str, Any] = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    headers = {"Idempotency-Key": "once"}
    first = client.batches.create(**options, extra_headers=headers)
    assert client.batches.create(**options, extra_headers=headers).id == first.id
    with pytest.raises(openai.ConflictError):
        client.batches.create(**options, metadata={"a": "b"}, extra_headers=headers)
    with Serving(api):
        wait_for(client, first.id, "completed")


def test_files_written_by_a_batch_last_as_long_as_it_asked(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("1")], output_expires_after={"anchor": "created_at", "seconds": 7200})
    with Serving(api):
        ended = wait_for(client, batch.id, "completed")
    output = client.files.retrieve(ended.output_file_id)
    assert output.expires_at - output.created_at == 7200


def test_a_batch_beyond_the_queues_quota_fails_with_that_and_what_is_made_counts(api: Api) -> None:
    client = limited_client(api, queued_jobs=5)
    fits = create(client, [completion_line(str(i), n=2) for i in range(2)])
    make_tasks(api).look()
    over = create(client, [completion_line("1"), completion_line("2")])
    make_tasks(api).look()
    failed = client.batches.retrieve(over.id)
    assert (failed.status, [error.code for error in failed.errors.data]) == ("failed", ["quota_exceeded"])
    assert "queued_jobs" in failed.errors.data[0].message
    assert api.as_tenant().get("/v1/limits").json()["quotas"]["queued_jobs"]["used"] == 4
    more = create(client, [completion_line("1")])
    make_tasks(api).look()
    with pytest.raises(openai.RateLimitError) as caught:
        create(client, [completion_line("2")])
    assert caught.value.code == "quota_exceeded"
    for batch in (fits, more):
        api.finish(batch.id)
    assert api.as_tenant().get("/v1/limits").json()["quotas"]["queued_jobs"]["used"] == 0
    make_tasks(api).look()
    api.ledger.check()


def test_a_shared_adapter_is_a_model_until_its_owner_takes_it_back(api: Api) -> None:
    owner = api.take_new_tenant()
    api.upload("theirs")
    caller = api.take_new_tenant()
    client = client_of(api)
    grants = "/v1/adapters/theirs/grants"
    assert api.as_tenant(owner).post(grants, json={"tenant": caller}).status_code == 201
    batch = create(client, [completion_line("1", f"{owner}/theirs")])
    early, late = make_tasks(api), make_tasks(api)
    with api.ledger.working() as conn:
        row = openai_batches.take_step(conn, uuid_of(batch.id), api.ledger.pool)
    early._validator.validate(row)
    assert api.as_tenant(owner).delete(f"{grants}/{caller}").status_code == 204
    refused = create(client, [completion_line("1", f"{owner}/theirs")])
    late.look()
    late.look()
    assert [error.code for error in client.batches.retrieve(refused.id).errors.data] == ["model_not_found"]
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.failed) == ("completed", 1)
    (line,) = read_lines(client, ended.error_file_id)
    assert line["response"]["body"]["error"]["code"] == "adapter_revoked"
    api.ledger.check()


def test_its_jobs_are_counted_by_adapter(api: Api) -> None:
    assert api.upload("add").status_code == 201
    client = client_of(api)
    lines = [completion_line(str(i), ("model", "add")[i % 2], n=1 + i % 2) for i in range(4)]
    batch = create(client, lines)
    with Serving(api, text="done"):
        wait_for(client, batch.id, "completed")
    found = api.as_tenant().get(f"/v1/batches/{batch.id}/adapters").json()["adapters"]
    assert {a["adapter"]: a["counts"]["succeeded"] for a in found} == {None: 2, "add": 4}


def test_the_end_of_a_batch_without_jobs_is_told_too(api: Api) -> None:
    client, native = client_of(api), api.as_tenant()
    body = {"url": "https://example.com/hook", "events": ["batch.finished"]}
    hook = native.post("/v1/webhooks", json=body).json()
    refused = create(client, [completion_line("0", "nobody")])
    cancelled = create(client, [completion_line("0")])
    client.batches.cancel(cancelled.id)
    make_tasks(api).look()
    told = native.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["deliveries"]
    payloads = [delivery["payload"]["data"] for delivery in told]
    assert {data["id"] for data in payloads} == {refused.id, cancelled.id}
    assert all(data["finished_at"] for data in payloads)


def test_the_end_of_a_batch_is_told_once_its_files_are_there_and_again_after_a_retry(api: Api) -> None:
    client, native = client_of(api), api.as_tenant()
    body = {"url": "https://example.com/hook", "events": ["batch.finished", "batch.failing"], "failed_jobs": 1}
    hook = native.post("/v1/webhooks", json=body).json()

    def told() -> list[str]:
        shown = native.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["deliveries"]
        return sorted(delivery["event"] for delivery in shown)

    batch = create(client, [completion_line("0")])
    tasks = make_tasks(api)
    tasks.look()
    broken = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(batch.id, state=JobState.FAILED, text=None, error=broken)
    assert told() == ["batch.failing"]
    one = native.post("/v1/webhooks", json=body | {"batch_id": batch.id}).json()
    assert native.get(f"/v1/webhooks/{one['id']}/deliveries").json()["deliveries"] == []
    tasks.look()
    assert told() == ["batch.failing", "batch.finished"]
    assert len(native.get(f"/v1/webhooks/{one['id']}/deliveries").json()["deliveries"]) == 1
    assert native.post(f"/v1/batches/{batch.id}/retry").status_code == 200
    finish_queued(api)
    assert told() == ["batch.failing", "batch.finished"]
    tasks.look()
    assert told() == ["batch.failing", "batch.finished", "batch.finished"]


def test_a_failure_whose_code_is_not_known_here_is_shown_as_it_is(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0")])
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="it broke"))
    with api.ledger.working() as conn:
        newer = "UPDATE job_results SET error_code = 'of_tomorrow' WHERE batch_id = :id"
        conn.execute(text(newer), {"id": uuid_of(batch.id)})
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    (line,) = read_lines(client, ended.error_file_id)
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) == (500, "of_tomorrow")


def test_a_file_of_answers_is_no_input(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0")])
    with Serving(api):
        ended = wait_for(client, batch.id, "completed")
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id=ended.output_file_id, endpoint="/v1/completions", completion_window="24h")
    assert caught.value.param == "input_file_id"


def test_what_was_uploaded_and_run_is_in_the_audit_log(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0", prompt="a secret prompt")])
    native = api.as_tenant()
    sweep = native.post("/v1/sweeps", json={"name": "s", "prompts": ["a secret prompt"], "include_base": True}).json()
    page = native.get("/v1/audit").json()
    assert [(e["action"], e["object"]) for e in reversed(page["entries"])] == [
        ("file.upload", batch.input_file_id),
        ("batch.create", batch.id),
        ("sweep.create", sweep["id"]),
    ]
    assert "secret prompt" not in str(page)
    client.batches.cancel(batch.id)
    native.post(f"/v1/batches/{sweep['id']}/cancel")
    make_tasks(api).look()
