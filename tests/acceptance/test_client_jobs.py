"""The client on jobs and batches: submitted, awaited, followed, cancelled, refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from api_server import Api
from working import Working

import medley
from medley.client import Batch, Client, Score
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Details, FinishReason, JobState

WAIT_S = 20.0


def test_a_result_arrives_when_its_job_has_ended(api: Api, client: Client) -> None:
    deadline = datetime.now(UTC) + timedelta(hours=1)
    job = client.submit("hello", custom_id="one", max_tokens=4, temperature=0.5, priority="high", deadline_at=deadline)
    assert (job.status.state, job.status.custom_id, job.status.result) == ("queued", "one", None)
    with Working(api, text="done"):
        completion = job.result(timeout=WAIT_S)
    assert completion.text == "done"
    assert completion.token_ids == (7, 7)
    assert list(completion.logprobs) == [pytest.approx(-0.1), pytest.approx(-0.1)]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 2)
    assert client.job(job.id).status == job.status
    assert client.batch(job.status.batch_id).status.deadline_at == deadline


def test_a_prompt_may_be_token_ids(client: Client) -> None:
    assert client.submit([1, 2, 3]).status.state == "queued"
    with pytest.raises(TypeError):
        client.submit([1.5])  # type: ignore[list-item]
    with pytest.raises(medley.InvalidRequest, match="prompt_token_ids"):
        client.submit([-1])


def test_a_wait_that_runs_out_leaves_the_job_as_it_is(api: Api, client: Client) -> None:
    job = client.submit("hello")
    for timeout in (0, 0.1):
        with pytest.raises(medley.Timeout, match=f"{job.id} is still queued after {timeout} s"):
            job.result(timeout=timeout)
    api.finish(job.status.batch_id)
    assert job.result(timeout=0).text == "ok"


def test_a_job_without_a_result_raises_what_became_of_it(api: Api, client: Client) -> None:
    failed, cancelled = client.submit("one"), client.submit("two")
    error = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(failed.status.batch_id, state=JobState.FAILED, text=None, error=error)
    with pytest.raises(medley.JobEnded, match="failed: engine: it broke") as raised:
        failed.result(timeout=WAIT_S)
    assert raised.value.status.error is not None
    assert raised.value.status.error.retryable
    assert cancelled.cancel().state == "cancelled"
    assert cancelled.cancel().state == "cancelled"
    with pytest.raises(medley.JobEnded, match="cancelled"):
        cancelled.result()


def test_a_batch_takes_texts_and_fields_and_gives_results_as_they_finish(api: Api, client: Client) -> None:
    rows: list[Any] = ["a", {"prompt": "b", "custom_id": "two", "max_tokens": 3}, {"prompt_token_ids": [5]}]
    batch = client.submit_many(rows, name="mine", max_tokens=9, temperature=0.5)
    assert (batch.status.name, batch.status.counts.total, batch.status.state) == ("mine", 3, "running")
    assert batch.job_ids is not None
    assert len(batch.job_ids) == 3
    assert client.job(batch.job_ids[1]).status.custom_id == "two"
    api.finish(batch.id, 2, text="first")
    seen = batch.results(timeout=WAIT_S, include_tokens=True)
    assert [(next(seen).seq, next(seen).seq) for _ in range(1)] == [(1, 2)]
    with Working(api, text="last"):
        last = list(seen)
    assert [(r.seq, r.text, r.token_ids) for r in last] == [(3, "last", (7, 7))]
    assert [r.seq for r in client.results(batch.id, after=1, timeout=WAIT_S)] == [2, 3]
    assert batch.refresh().has_finished
    assert batch.wait(timeout=0).counts.succeeded == 3


def test_what_has_ended_is_read_without_waiting_for_the_rest(api: Api, client: Client) -> None:
    batch = client.submit_many(["a", "b", "c"])
    assert list(batch.results(follow=False)) == []
    api.finish(batch.id, 2)
    assert [r.seq for r in batch.results(follow=False)] == [1, 2]
    with pytest.raises(medley.Timeout, match=batch.id):
        batch.wait(timeout=0.1)
    with pytest.raises(medley.Timeout, match=batch.id):
        list(batch.results(timeout=0.1))


def test_a_large_batch_travels_as_lines_and_is_read_page_by_page(api: Api, client: Client) -> None:
    deadline = datetime.now(UTC) + timedelta(hours=1)
    rows = [{"prompt": "say", "custom_id": f"c{i}"} for i in range(2_500)]
    batch = client.submit_many(rows, name="large", deadline_at=deadline, max_tokens=4, logit_bias={3: -1.5})
    assert (batch.status.name, batch.status.deadline_at, batch.status.counts.total) == ("large", deadline, 2_500)
    assert batch.job_ids is not None
    assert client.job(batch.job_ids[2_499]).status.custom_id == "c2499"
    api.finish(batch.id)
    results = list(batch.results(timeout=WAIT_S))
    assert [r.seq for r in results] == list(range(1, 2_501))
    assert {r.custom_id for r in results} == {f"c{i}" for i in range(2_500)}
    assert batch.wait(timeout=WAIT_S).counts.succeeded == 2_500


def test_a_file_is_submitted_as_it_is_and_one_with_bad_lines_not_at_all(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "custom_id": "two"}\n')
    assert client.submit_file(file, adapter=None, max_tokens=3).status.counts.total == 2
    file.write_text('{"prompt": "a"}\n{"promt": "b"}\nnonsense\n{"prompt": "c", "max_tokens": 0}\n')
    num_batches = len(client.batches())
    with pytest.raises(medley.InvalidRequest) as raised:
        client.submit_file(file)
    assert {fault.line for fault in raised.value.faults} == {2, 3, 4}
    assert len(client.batches()) == num_batches


def test_batches_are_paused_resumed_and_cancelled(client: Client) -> None:
    batch = client.submit_many(["a", "b"])
    assert batch.pause().state == "paused"
    assert batch.resume().state == "running"
    status = client.cancel(batch)
    assert status.state == "finished"
    assert [r.state for r in batch.results(timeout=WAIT_S)] == ["cancelled", "cancelled"]
    with pytest.raises(KeyboardInterrupt), client.submit_many(["a"]) as cut:
        raise KeyboardInterrupt
    assert cut.refresh().counts.cancelled == 1
    by_id = client.submit("x")
    assert client.cancel(by_id.id).state == "cancelled"
    assert client.cancel(client.submit_many(["y"]).id).state == "finished"


def test_one_text_is_no_list_of_jobs(client: Client) -> None:
    with pytest.raises(TypeError, match="one text"):
        client.submit_many("hello")
    with pytest.raises(TypeError, match="one text"):
        client.sweep("name", "hello", adapters=["*"])


def test_every_refusal_has_its_type_and_all_its_faults(api: Api, client: Client) -> None:
    job = client.submit("mine", idempotency_key="key")
    with pytest.raises(medley.InvalidRequest) as invalid:
        client.submit("", adapter="nobody", top_p=7, temprature=1)
    assert {fault.field for fault in invalid.value.faults} >= {"prompt", "adapter", "top_p", "temprature"}
    assert invalid.value.code == "invalid_request"
    with pytest.raises(medley.InvalidRequest, match="and 10 more") as many:
        client.submit_many([""] * 30)
    assert len(many.value.faults) == 30
    with pytest.raises(medley.Conflict) as conflict:
        client.submit("other", idempotency_key="key")
    assert conflict.value.code == "idempotency_conflict"
    assert client.submit("mine", idempotency_key="key").id == job.id
    with pytest.raises(medley.TooLarge):
        client.submit_many(["x" * 900] * 3_000)
    with Client(api.url, "mk_00000000_nobody") as stranger, pytest.raises(medley.Authentication, match="API key"):
        stranger.submit("x")
    with Client(api.url, api.key("another")) as another:
        for ask in (another.job, another.cancel):
            with pytest.raises(medley.NotFound, match=job.id):
                ask(job.id)
        with pytest.raises(medley.NotFound):
            another.batch(job.status.batch_id)
    for name in ("job_x", "../tenant", "a?b", "%2e%2e"):
        with pytest.raises(medley.NotFound):
            client.job(name)
    with pytest.raises(medley.APIError) as other:
        client._transport.request("GET", "/v1/batches", params={"limit": 0})
    assert isinstance(other.value, medley.MedleyError)


def test_a_client_knows_its_tenant_its_batches_and_the_workers(api: Api, client: Client, tenant: str) -> None:
    assert client.tenant() == tenant
    ids = [client.submit_many(["a"]).id for _ in range(3)]
    assert [b.id for b in client.batches(limit=2)] == ids[:0:-1]
    worker = api.ledger.start_worker(max_num_seqs=5)
    shown = {w.id: w for w in client.workers()}[f"worker_{worker.hex}"]
    assert (shown.state, shown.max_num_seqs, shown.num_leased) == ("active", 5, 0)


def test_the_handles_say_what_they_are(client: Client) -> None:
    job, batch = client.submit("a"), client.submit_many(["a"])
    assert repr(job) == f"<Job {job.id} queued>"
    assert repr(batch) == f"<Batch {batch.id} running 0/1>"
    assert isinstance(client.find(batch.id), Batch)


def test_scores_and_alternatives_come_back_as_types(api: Api, client: Client) -> None:
    details = Details(
        top_token_ids=(7, 8, 7, 9),
        top_logprobs=(-0.5, -1.0, -0.25, -2.0),
        prompt_token_ids=(1, 2, 3),
        prompt_logprobs=(-1.0, -2.0),
        is_greedy=True,
    )
    job = client.submit("hello", continuation=" world", top_logprobs=2, prompt_logprobs=0)
    ids = client.submit([1, 2], continuation=[3])
    batch = client.submit_many(["a", {"prompt": "b", "n": 1}], n=2, choice=["x", "y"], temperature=1.0)
    with Working(api, text="x", details=details, finish_reason=FinishReason.SCORED):
        completion = job.result(timeout=WAIT_S)
        assert ids.result(timeout=WAIT_S).score is not None
        results = list(batch.results(timeout=WAIT_S, include_tokens=True))
    assert completion.score == Score(logprob=pytest.approx(-0.2), is_greedy=True)
    assert completion.usage.completion_tokens == 0
    assert completion.top_token_ids == ((7, 8), (7, 9))
    assert completion.prompt_logprobs == (None, -1.0, -2.0)
    assert completion.prompt_top_token_ids is None
    assert sorted(r.sample_idx for r in results if r.sample_idx is not None) == [0, 0, 1]
    assert {r.top_token_ids for r in results} == {((7, 8), (7, 9))}
