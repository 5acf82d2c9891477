"""Retries of OpenAI batches: back in progress, counted by the latest attempts, with new files at their next end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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

import medley
from medley.config import Limits, Quotas
from medley.db import openai_batches
from medley.db.connections import tenant_transaction
from medley.db.files import read_unwanted
from medley.db.flags import expire_queued
from medley.db.quotas import reserve
from medley.db.retries import Wanted, retry
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

LIMITS = Limits(max_jobs_per_request=1000)
BROKEN: dict[str, Any] = {
    "state": JobState.FAILED,
    "text": None,
    "num_tokens": 1,
    "error": JobError(code=ErrorCode.ENGINE, message="it broke"),
}


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


def ask_retry(api: Api, batch_id: str, **body: Any) -> Any:
    return api.as_tenant().post(f"/v1/batches/{batch_id}/retry", json=body)


def retried(api: Api, batch_id: str, **body: Any) -> dict[str, Any]:
    response = ask_retry(api, batch_id, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def counts_of(batch: Any) -> tuple[int, int, int]:
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def failed_batch(api: Api, num_lines: int = 1) -> Any:
    """A batch that has ended and whose requests have all failed."""
    batch = create(client_of(api), [completion_line(str(i)) for i in range(num_lines)])
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, **BROKEN)
    tasks.look()
    return client_of(api).batches.retrieve(batch.id)


def test_a_retry_takes_the_batch_back_in_progress_and_its_next_files_show_the_latest(api: Api) -> None:
    client = client_of(api)
    lines = [completion_line("0"), completion_line("1", n=3, prompt=["a", "b"]), completion_line("2")]
    batch = create(client, lines)
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, 3, text="early")
    api.finish(batch.id, 2, **BROKEN)
    api.finish(batch.id, 2, text="early")
    api.finish(batch.id, **BROKEN)
    tasks.look()
    first = client.batches.retrieve(batch.id)
    assert (first.status, counts_of(first)) == ("completed", (3, 1, 2))
    # Seven good jobs of which samples beyond the first count no prompt, and three that failed after a token.
    assert (first.usage.input_tokens, first.usage.output_tokens) == (4 * 3, 5 * 2 + 3)
    old_output, old_errors = first.output_file_id, first.error_file_id
    old_bytes = client.files.content(old_output).content
    assert [line["custom_id"] for line in read_lines(client, old_errors)] == ["1", "2"]

    assert retried(api, batch.id)["counts"]["retried"] == 3
    again = client.batches.retrieve(batch.id)
    assert (again.status, counts_of(again)) == ("in_progress", (3, 1, 0))
    assert (again.completed_at, again.finalizing_at, again.output_file_id, again.error_file_id) == (None,) * 4
    assert (again.created_at, again.in_progress_at) == (first.created_at, first.in_progress_at)
    assert again.usage == first.usage, "what was counted stays counted"
    tasks.look()
    assert client.batches.retrieve(batch.id).status == "in_progress", "its jobs have not ended"
    assert client.files.content(old_output).content == old_bytes

    api.finish(batch.id, 2, text="late")
    assert counts_of(client.batches.retrieve(batch.id)) == (3, 2, 0)
    api.finish(batch.id, **BROKEN)
    tasks.look()
    second = client.batches.retrieve(batch.id)
    assert (second.status, counts_of(second)) == ("completed", (3, 2, 1))
    # Of the two samples that were made again one was the first of its prompt.
    assert (second.usage.input_tokens, second.usage.output_tokens) == (12 + 2 * 3, 13 + 2 * 2 + 1)
    assert second.completed_at >= first.completed_at
    assert not {second.output_file_id, second.error_file_id} & {old_output, old_errors}
    found = read_lines(client, second.output_file_id)
    assert [line["custom_id"] for line in found] == ["0", "1"]
    choices = found[1]["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == ["early", "early", "late", "late", "early", "early"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [line["custom_id"] for line in read_lines(client, second.error_file_id)] == ["2"]
    assert client.files.content(old_output).content == old_bytes, "a file that was shown never changes"

    retried(api, batch.id)
    api.finish(batch.id, text="last")
    tasks.look()
    third = client.batches.retrieve(batch.id)
    assert (counts_of(third), third.error_file_id) == ((3, 3, 0), None)
    assert [line["custom_id"] for line in read_lines(client, third.output_file_id)] == ["0", "1", "2"]
    native = api.as_tenant().get(f"/v1/batches/{batch.id}").json()
    assert native["counts"]["retried"] == 4
    assert third.usage.output_tokens == native["usage"]["completion_tokens"]
    api.ledger.recount()


def test_a_retried_job_is_its_forerunner_in_all_but_its_id(api: Api) -> None:
    assert api.upload("add").status_code == 201
    client = client_of(api)
    fields: dict[str, Any] = {"n": 2, "seed": 5, "echo": True, "logprobs": 2, "temperature": 0.5, "stop": ["x"]}
    batch = create(client, [completion_line("0", "add", prompt=[1, 2, 3], **fields)])
    tasks = make_tasks(api)
    tasks.look()
    id_ = {"id": uuid_of(batch.id)}
    with api.ledger.working() as conn:  # as of a chat, whose prompt was rendered
        conn.execute(text("UPDATE job_inputs SET is_templated = true WHERE batch_id = :id"), id_)
    api.finish(batch.id, **BROKEN)
    retried(api, batch.id)
    with api.ledger.working() as conn:
        inputs = conn.execute(text("SELECT * FROM job_inputs WHERE batch_id = :id ORDER BY job_id"), id_).all()
        jobs = conn.execute(text("SELECT * FROM jobs WHERE batch_id = :id ORDER BY id"), id_).all()
    was, now = inputs[:2], inputs[2:]
    assert [row.retry_of for row in now] == [row.job_id for row in was]
    assert was[0].answer is not None
    for old, new in zip(was, now, strict=True):
        same = old._mapping.keys() - {"job_id", "retry_of"}
        assert {name: old._mapping[name] for name in same} == {name: new._mapping[name] for name in same}
    differ = {"id", "state", "attempt", "created_at", "leased_at", "finished_at"}
    for old, new in zip(jobs[:2], jobs[2:], strict=True):
        same = old._mapping.keys() - differ
        assert {name: old._mapping[name] for name in same} == {name: new._mapping[name] for name in same}
    with Serving(api, text="done"):
        wait_for(client, batch.id, "completed")
    (found,) = api.as_tenant().get(f"/v1/batches/{batch.id}/adapters").json()["adapters"]
    assert (found["adapter"], found["counts"]["succeeded"], found["counts"]["failed"]) == ("add", 2, 0)
    api.ledger.recount()


def test_what_was_cancelled_and_what_expired_is_retried_too(api: Api) -> None:
    client, tasks = client_of(api), make_tasks(api)
    cancelled = create(client, [completion_line(str(i)) for i in range(3)])
    tasks.look()
    api.finish(cancelled.id, 1)
    client.batches.cancel(cancelled.id)
    assert ask_retry(api, cancelled.id, states=["cancelled"]).status_code == 200, "it may be retried before its files"
    again = client.batches.retrieve(cancelled.id)
    assert (again.status, again.cancelling_at, counts_of(again)) == ("in_progress", None, (3, 1, 0))
    client.batches.cancel(cancelled.id)
    tasks.look()
    ended = client.batches.retrieve(cancelled.id)
    assert (ended.status, counts_of(ended)) == ("cancelled", (3, 1, 2))
    retried(api, cancelled.id, states=["cancelled"])
    again = client.batches.retrieve(cancelled.id)
    assert (again.status, again.cancelling_at, again.cancelled_at) == ("in_progress", None, None)
    api.finish(cancelled.id)
    tasks.look()
    ended = client.batches.retrieve(cancelled.id)
    assert (ended.status, ended.cancelled_at, counts_of(ended)) == ("completed", None, (3, 3, 0))

    late = create(client, [completion_line("0"), completion_line("1")], completion_window="1h")
    tasks.look()
    api.finish(late.id, 1)
    api.ledger.let_deadline_pass(uuid_of(late.id))
    with api.ledger.working() as conn:
        expire_queued(conn)
        passed = "UPDATE batches SET deadline_at = clock_timestamp() WHERE id = :id"
        conn.execute(text(passed), {"id": uuid_of(late.id)})
    tasks.look()
    assert client.batches.retrieve(late.id).status == "expired"
    refused = ask_retry(api, late.id, states=["expired"])
    assert (refused.status_code, "deadline_at" in refused.json()["error"]["message"]) == (409, True)
    assert api.as_tenant().patch(f"/v1/batches/{late.id}", json={"deadline_at": None}).status_code == 200
    retried(api, late.id, states=["expired"])
    again = client.batches.retrieve(late.id)
    assert (again.status, again.expired_at, again.expires_at) == ("in_progress", None, None)
    api.finish(late.id)
    tasks.look()
    ended = client.batches.retrieve(late.id)
    assert (ended.status, ended.expired_at, counts_of(ended)) == ("completed", None, (2, 2, 0))
    api.ledger.recount()


def test_nothing_to_retry_leaves_the_batch_at_its_end(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0")])
    with Serving(api, text="done"):
        before = wait_for(client, batch.id, "completed")
    assert retried(api, batch.id)["counts"]["retried"] == 0
    assert client.batches.retrieve(batch.id) == before
    api.ledger.check()


def test_a_batch_that_has_no_jobs_says_why_it_is_not_retried(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0", "nobody")])
    refused = ask_retry(api, batch.id)
    assert (refused.status_code, "being validated" in refused.text) == (409, True)
    make_tasks(api).look()
    assert client.batches.retrieve(batch.id).status == "failed"
    refused = ask_retry(api, batch.id)
    assert (refused.status_code, "create a batch from a corrected file" in refused.text) == (409, True)
    assert client.batches.retrieve(batch.id).status == "failed"
    cancelled = create(client, [completion_line("0")])
    client.batches.cancel(cancelled.id)
    make_tasks(api).look()
    refused = ask_retry(api, cancelled.id, states=["cancelled"])
    assert (refused.status_code, "create it again" in refused.text) == (409, True)
    assert api.as_tenant("globex").post(f"/v1/batches/{batch.id}/retry").status_code == 404


def test_a_retry_while_lines_become_jobs_adds_to_them(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", 2)
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(6)])
    tasks = make_tasks(api)

    def break_first() -> None:
        if (
            client.batches.retrieve(batch.id).status == "in_progress"
            and not api.as_tenant().get(f"/v1/batches/{batch.id}").json()["counts"]["retried"]
        ):
            api.finish(batch.id, 2, **BROKEN)
            retried(api, batch.id)

    tasks._validator._on_chunk = break_first
    tasks.look()
    assert counts_of(client.batches.retrieve(batch.id)) == (6, 0, 0)
    api.finish(batch.id)
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, counts_of(ended)) == ("completed", (6, 6, 0))
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == [str(i) for i in range(6)]
    api.ledger.recount()


def test_lines_that_were_no_jobs_yet_when_the_batch_was_cancelled_can_be_retried(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", 2)
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(6)])
    tasks = make_tasks(api)

    def retry_and_cancel() -> None:
        if client.batches.retrieve(batch.id).status == "in_progress":
            api.finish(batch.id, 2, **BROKEN)
            retried(api, batch.id)
            client.batches.cancel(batch.id)

    tasks._validator._on_chunk = retry_and_cancel
    tasks.look()
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, counts_of(ended)) == ("cancelled", (6, 0, 6))
    api.ledger.recount()
    tasks._validator._on_chunk = lambda: None
    assert retried(api, batch.id, states=["cancelled"])["counts"]["retried"] == 2 + 6
    with Serving(api, text="done"):
        ended = wait_for(client, batch.id, "completed")
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == [str(i) for i in range(6)]
    api.ledger.recount()


def test_a_retry_while_the_files_are_written_ends_the_batch_by_the_next_results_alone(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0"), completion_line("1")])
    slow, tasks = make_tasks(api), make_tasks(api)
    tasks.look()
    api.finish(batch.id, **BROKEN)
    with api.ledger.working() as conn:
        openai_batches.begin_finalizing(conn, api.ledger.pool)
        row = openai_batches.take_step(conn, uuid_of(batch.id), api.ledger.pool)
    stored: list[Any] = []
    store = slow._finalizer._store

    def store_late(*args: Any) -> Any:
        """The files are written; before the batch is at its end by them, it is retried and comes to another end."""
        file = store(*args)
        if file is not None:
            stored.append(file)
            assert retried(api, batch.id)["counts"]["retried"] == 2
            assert client.batches.retrieve(batch.id).status == "in_progress"
            api.finish(batch.id, text="done")
            with api.ledger.working() as conn:
                openai_batches.begin_finalizing(conn, api.ledger.pool)
            assert client.batches.retrieve(batch.id).status == "finalizing"
        return file

    slow._finalizer._store = store_late  # type: ignore[method-assign]
    slow._finalizer.finalize(row)
    assert client.batches.retrieve(batch.id).status == "finalizing", "what was read before the retry is no end"
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, counts_of(ended), ended.error_file_id) == ("completed", (2, 2, 0), None)
    assert len(read_lines(client, ended.output_file_id)) == 2
    assert len(list(client.files.list(purpose="batch_output"))) == 1, "files that are no batch's are shown to nobody"
    with api.ledger.working() as conn:
        unwanted = {found.id for found in read_unwanted(conn, unstored_after_s=3600, limit=1000)}
    assert stored[0] in unwanted, "its bytes go"
    api.ledger.recount()


def test_a_retry_that_is_being_committed_is_not_passed_over_by_the_look_for_ended_batches(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("0")])
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, **BROKEN)
    tenant = api.tenant_id(api._tenant)
    with tenant_transaction(api.ledger.api, tenant) as conn:
        made = retry(conn, uuid_of(batch.id), Wanted())
        reserve(conn, tenant, Quotas(), uuid_of(batch.id), num_jobs=made.num_jobs, num_bytes=made.num_bytes)
        tasks.look()
    assert client.batches.retrieve(batch.id).status == "in_progress"
    tasks.look()
    assert client.batches.retrieve(batch.id).status == "in_progress"
    api.finish(batch.id, text="done")
    tasks.look()
    assert counts_of(client.batches.retrieve(batch.id)) == (1, 1, 0)
    api.ledger.recount()


def test_retries_at_once_make_each_job_again_once(api: Api) -> None:
    batch = failed_batch(api, 20)
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: retried(api, batch.id), range(5)))
    assert {answer["counts"]["retried"] for answer in answers} == {20}
    with Serving(api, text="done"):
        ended = wait_for(client_of(api), batch.id, "completed")
    assert counts_of(ended) == (20, 20, 0)
    api.ledger.recount()


def test_a_retry_needs_no_input_file_and_its_files_last_as_long_as_the_batch_asked(api: Api) -> None:
    client = client_of(api)
    file = upload(client, [completion_line("0")])
    batch = client.batches.create(
        input_file_id=file,
        endpoint="/v1/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, **BROKEN)
    tasks.look()
    client.files.delete(file)
    tasks._validator._objects.delete(f"files/{api.tenant_id(api._tenant).hex}/{uuid_of(file).hex}")
    retried(api, batch.id)
    finish_queued(api)
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    output = client.files.retrieve(ended.output_file_id)
    assert (ended.status, output.expires_at - output.created_at) == ("completed", 7200)
    api.ledger.recount()


@pytest.mark.parametrize("limit", [{"queued_jobs": 3}, {"storage_bytes": 2500}])
def test_a_retry_counts_against_the_quotas_of_queue_and_storage(api: Api, limit: dict[str, float]) -> None:
    client = limited_client(api, **limit)
    batch = failed_batch(api, 3)
    used = api.as_tenant().get("/v1/limits").json()["quotas"]["storage_bytes"]["used"]
    filling = None
    if "queued_jobs" in limit:
        filling = api.as_tenant().post("/v1/jobs", json={"prompt": "x"}).json()["batch_id"]
    else:
        filling = upload(client, b" " * int(2500 - used - 10))
    refused = ask_retry(api, batch.id)
    assert (refused.status_code, next(iter(limit)) in refused.text) == (429, True)
    assert client.batches.retrieve(batch.id) == batch, "a refusal leaves the batch at its end"
    api.ledger.recount()
    if "queued_jobs" in limit:
        api.finish(filling)
        assert retried(api, batch.id)["state"] == "running"
        with Serving(api, text="done"):
            wait_for(client, batch.id, "completed")


def test_our_client_retries_a_batch_that_theirs_has_made(api: Api) -> None:
    batch = failed_batch(api, 2)
    key = api.as_tenant().headers["Authorization"].removeprefix("Bearer ")
    with medley.Client(api.url, key) as ours, Serving(api, text="done"):
        found = ours.batch(batch.id)
        assert found.retry(codes="retryable").counts.retried == 2
        found.wait(timeout=60)
        latest = list(found.results(latest=True))
        assert [(result.custom_id, result.text) for result in latest] == [("0", "done"), ("1", "done")]
        wait_for(client_of(api), batch.id, "completed")
