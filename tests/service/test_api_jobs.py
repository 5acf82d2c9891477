"""Jobs over HTTP: made once, read, waited for, cancelled; refused whole with every fault named."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from api_server import Api, fields_of
from timing import keeps_to, timed
from waiting import wait_until

from medley.config import Limits

LIMITS = Limits(max_body_bytes=1 << 20, max_prompt_bytes=1000, max_jobs_per_request=100)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def submit(api: Api, **fields: Any) -> dict[str, Any]:
    response = api.as_tenant().post("/v1/jobs", json={"prompt": "hello", **fields})
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def test_a_job_is_queued_and_its_result_is_read_when_a_worker_has_stored_it(api: Api) -> None:
    job = submit(api, custom_id="one", max_tokens=8, temperature=0.5, seed=7, stop=["x"], logit_bias={"3": -1.5})
    assert job["state"] == "queued"
    assert job["object"] == "job"
    assert (job["custom_id"], job["adapter"], job["result"], job["error"]) == ("one", None, None, None)
    api.finish(job["batch_id"], text="done")
    ended = api.as_tenant().get(f"/v1/jobs/{job['id']}").json()
    assert ended["state"] == "succeeded"
    assert ended["result"] == {
        "text": "done",
        "token_ids": [7, 7],
        "logprobs": [pytest.approx(-0.1), pytest.approx(-0.1)],
        "finish_reason": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert (ended["seq"], ended["attempt"]) == (1, 1)
    assert ended["finished_at"] is not None
    api.ledger.check()


def test_what_is_wrong_with_a_job_is_said_all_at_once_and_nothing_is_queued(api: Api) -> None:
    num_jobs = len(api.ledger.jobs())
    body = {
        "prompt": "a\0b",
        "prompt_token_ids": [1, 2],
        "adapter": "nobody",
        "custom_id": "",
        "priority": "urgent",
        "deadline_at": "tomorrow",
        "max_tokens": 0,
        "temperature": "hot",
        "colour": "red",
    }
    response = api.as_tenant().post("/v1/jobs", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert set(fields_of(response)) == {
        "prompt",
        "adapter",
        "custom_id",
        "priority",
        "deadline_at",
        "max_tokens",
        "temperature",
        "colour",
    }
    assert all(fault["got"] and fault["wanted"] for fault in error["faults"])
    assert len(api.ledger.jobs()) == num_jobs


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b'{"prompt": "a"', "body"),
        (b'{"prompt": "a"} x', "body"),
        (b'{"prompt": "\xff"}', "prompt"),
        (b'{"prompt": "\\ud800"}', "body"),
        (b"{}", "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt_token_ids": []}', "prompt_token_ids"),
        (b'{"prompt_token_ids": [1, -1]}', "prompt_token_ids[1]"),
        (b'{"prompt_token_ids": [4294967296]}', "prompt_token_ids[0]"),
        (b'{"prompt": "' + b"a" * 1001 + b'"}', "prompt"),
        (b'{"prompt": "' + "é".encode() * 501 + b'"}', "prompt"),
        (b'{"prompt_token_ids": [' + b"1," * 250 + b"1]}", "prompt_token_ids"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias.1"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
        (b'{"prompt": "a", "stop": ["a\\u0000"]}', "stop"),
        (b'{"prompt": "a", "sampling": {"max_tokens": 4}}', "sampling"),
        (b'{"prompt": "a", "deadline_at": "2030-01-01T00:00:00"}', "deadline_at"),
        (b'{"prompt": "a", "temperature": 1e400}', "temperature"),
        (b'{"prompt": "a", "logit_bias": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "body"),
    ],
)
def test_a_body_that_is_no_job_is_refused_by_its_field(api: Api, body: bytes, field: str) -> None:
    response = api.as_tenant().post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert field in fields_of(response)


def test_unknown_parameters_and_bad_waits_are_refused(api: Api) -> None:
    job = submit(api)["id"]
    assert fields_of(api.as_tenant().get(f"/v1/jobs/{job}?wait=61&colour=red")) == ["wait", "colour"]
    assert fields_of(api.as_tenant().get(f"/v1/jobs/{job}?wait=soon")) == ["wait"]
    assert fields_of(api.as_tenant().get(f"/v1/jobs/{job}?wait=nan")) == ["wait"]


def test_what_is_sent_twice_is_refused(api: Api) -> None:
    twice = api.as_tenant().get("/v1/batches?limit=1&limit=2")
    assert (twice.status_code, fields_of(twice)) == (400, ["limit"])
    headers = [("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    twice = api.as_tenant().post("/v1/jobs", json={"prompt": "p"}, headers=headers)
    assert (twice.status_code, fields_of(twice)) == (400, ["Idempotency-Key"])


def test_every_endpoint_is_closed_to_the_anonymous_and_to_unknown_keys(api: Api) -> None:
    job = submit(api)
    paths = [
        ("POST", "/v1/jobs"),
        ("GET", f"/v1/jobs/{job['id']}"),
        ("POST", f"/v1/jobs/{job['id']}/cancel"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches"),
        ("GET", f"/v1/batches/{job['batch_id']}"),
        ("GET", f"/v1/batches/{job['batch_id']}/results"),
        ("POST", f"/v1/batches/{job['batch_id']}/cancel"),
        ("POST", f"/v1/batches/{job['batch_id']}/pause"),
        ("POST", f"/v1/batches/{job['batch_id']}/resume"),
        ("PUT", "/v1/adapters/a"),
        ("GET", "/v1/adapters"),
        ("GET", "/v1/adapters/a"),
        ("DELETE", "/v1/adapters/a"),
        ("POST", "/v1/sweeps"),
        ("GET", "/v1/sweeps"),
        ("GET", "/v1/sweeps/a"),
        ("GET", "/v1/sweeps/a/report"),
        ("GET", "/v1/workers"),
        ("GET", "/v1/tenant"),
    ]
    for authorization in (None, "Bearer", "Basic abc", "Bearer mk_00000000_" + "a" * 43, "Bearer x" + "y" * 500):
        headers = {} if authorization is None else {"Authorization": authorization}
        for method, path in paths:
            response = api.anonymous.request(method, path, headers=headers)
            assert response.status_code == 401, (method, path)
            assert response.json()["error"]["code"] == "unauthorized"
            assert "Bearer" in response.headers["www-authenticate"]


def test_another_tenants_things_do_not_exist(api: Api) -> None:
    job = submit(api)
    other = api.as_tenant("globex")
    for method, path in [
        ("GET", f"/v1/jobs/{job['id']}"),
        ("POST", f"/v1/jobs/{job['id']}/cancel"),
        ("GET", f"/v1/batches/{job['batch_id']}"),
        ("GET", f"/v1/batches/{job['batch_id']}/results"),
        ("POST", f"/v1/batches/{job['batch_id']}/cancel"),
        ("POST", f"/v1/batches/{job['batch_id']}/pause"),
        ("POST", f"/v1/batches/{job['batch_id']}/resume"),
        ("GET", f"/v1/jobs/{'job_' + '0' * 32}"),
        ("GET", "/v1/jobs/nonsense"),
        ("GET", "/v1/batches/nonsense"),
        ("GET", "/nowhere"),
    ]:
        response = other.request(method, path)
        assert response.status_code == 404, (method, path)
        assert response.json()["error"]["code"] == "not_found"
    assert other.get("/v1/batches").json()["batches"] == []
    assert api.as_tenant().get(f"/v1/jobs/{job['id']}").json()["state"] == "queued"
    assert other.get("/v1/tenant").json()["name"] == "globex"


def test_a_revoked_key_stops_working_within_seconds(api: Api) -> None:
    from sqlalchemy import text

    statement = text("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE id = :id")
    numbers = itertools.count()

    def attempt() -> float:
        key = api.key(f"initech{next(numbers)}")
        headers = {"Authorization": f"Bearer {key}"}
        assert api.anonymous.get("/v1/tenant", headers=headers).status_code == 200
        api.owner(lambda conn: conn.execute(statement, {"id": key.split("_")[1]}))
        with timed() as took:
            wait_until(lambda: api.anonymous.get("/v1/tenant", headers=headers).status_code == 401, "its end")
        return took.seconds

    keeps_to(7, attempt)


def test_the_same_create_again_is_the_same_job_and_another_one_under_its_key_is_a_conflict(api: Api) -> None:
    tenant, headers = api.as_tenant(), {"Idempotency-Key": "k1"}
    first = tenant.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
    again = tenant.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = tenant.post("/v1/jobs", json={"prompt": "b"}, headers=headers)
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_conflict"
    assert tenant.post("/v1/batches", json={"jobs": [{"prompt": "a"}]}, headers=headers).status_code == 409
    # Another tenant's key of the same spelling is another key.
    assert api.as_tenant("globex").post("/v1/jobs", json={"prompt": "b"}, headers=headers).status_code == 201
    for bad in ("x" * 201, "a\tb"):
        assert tenant.post("/v1/jobs", json={"prompt": "a"}, headers={"Idempotency-Key": bad}).status_code == 400


def test_a_refused_create_leaves_its_key_free(api: Api) -> None:
    headers = {"Idempotency-Key": "k2"}
    assert api.as_tenant().post("/v1/jobs", json={"prompt": ""}, headers=headers).status_code == 400
    assert api.as_tenant().post("/v1/jobs", json={"prompt": "a"}, headers=headers).status_code == 201


def test_fifty_equal_creates_at_once_make_one_batch(api: Api) -> None:
    def post(_: int) -> dict[str, Any]:
        body = {"name": "fifty", "jobs": [{"prompt": "a"}, {"prompt": "b"}]}
        response = api.as_tenant().post("/v1/batches", json=body, headers={"Idempotency-Key": "fifty"})
        assert response.status_code == 201, response.text
        batch: dict[str, Any] = response.json()
        return batch

    api.as_tenant()
    with ThreadPoolExecutor(50) as pool:
        batches = list(pool.map(post, range(50)))
    assert len({batch["id"] for batch in batches}) == 1
    assert len({tuple(batch["job_ids"]) for batch in batches}) == 1
    listed = api.as_tenant().get("/v1/batches?limit=1000").json()["batches"]
    assert sum(batch["name"] == "fifty" for batch in listed) == 1


@pytest.mark.parametrize("rings", [True, False])
def test_a_waiting_read_returns_within_a_second_of_the_end_with_and_without_the_ring(api: Api, rings: bool) -> None:
    def attempt() -> float:
        job = submit(api)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(api.as_tenant().get, f"/v1/jobs/{job['id']}?wait=30")
            threading.Event().wait(0.3)
            assert not waiting.done()
            api.finish(job["batch_id"], rings=rings)
            with timed() as took:
                assert waiting.result(timeout=60).json()["state"] == "succeeded"
        return took.seconds

    keeps_to(0.5 if rings else 1.6, attempt)


def test_a_wait_that_ends_without_a_result_returns_the_present_state(api: Api) -> None:
    job = submit(api)
    started = time.monotonic()
    assert api.as_tenant().get(f"/v1/jobs/{job['id']}?wait=0.4").json()["state"] == "queued"
    assert 0.35 < time.monotonic() - started < 20


def test_a_hundred_waiters_hold_no_connection_and_all_return(api: Api) -> None:
    batch = api.as_tenant().post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 100}).json()
    with ThreadPoolExecutor(100) as pool:
        waiting = [pool.submit(api.as_tenant().get, f"/v1/jobs/{job}?wait=30") for job in batch["job_ids"]]
        threading.Event().wait(0.5)
        # With every waiter in place, everyone else is served as ever.
        assert api.as_tenant("globex").get("/v1/tenant").status_code == 200
        assert api.as_tenant("globex").post("/v1/jobs", json={"prompt": "a"}).status_code == 201
        api.finish(batch["id"], rings=False)
        assert all(w.result(timeout=20).json()["state"] == "succeeded" for w in waiting)


def test_a_queued_job_is_cancelled_once_and_an_ended_one_stays_as_it_is(api: Api) -> None:
    job = submit(api)
    assert api.as_tenant().post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert api.as_tenant().post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    done = submit(api)
    api.finish(done["batch_id"])
    assert api.as_tenant().post(f"/v1/jobs/{done['id']}/cancel").json()["state"] == "succeeded"
    api.ledger.check()


def test_a_body_beyond_the_limit_is_refused_declared_or_not_and_before_it_is_parsed(api: Api) -> None:
    declared = api.as_tenant().post("/v1/jobs", content=b"x" * (1 << 20) + b"x")
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(17):
            yield b"x" * (1 << 16)

    for kind in ("application/json", "application/x-ndjson"):
        chunked = api.as_tenant().post("/v1/batches", content=chunks(), headers={"Content-Type": kind})
        assert chunked.status_code == 413


def test_errors_have_one_shape_whatever_fails(api: Api) -> None:
    response = api.as_tenant().get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert set(response.json()["error"]) == {"code", "message", "faults"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/jobs", "POST"),
        ("PUT", "/v1/batches", "GET, POST"),
        ("DELETE", "/openai/v1/batches", "GET, POST"),
        ("POST", "/v1/batches/batch_x", "GET, PATCH"),
    ],
)
def test_a_method_that_is_not_served_is_told_which_are(api: Api, method: str, path: str, allowed: str) -> None:
    response = api.as_tenant().request(method, path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["Allow"] == allowed
    assert allowed in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field", "wanted"),
    [
        (b'{"prompt": "x", "max_tokens": "many"}', "max_tokens", "`int`"),
        (b'{"prompt": "x", "stop": [1]}', "stop[0]", "`str`"),
        (b'{"prompt": "\xff"}', "prompt", "UTF-8"),
    ],
)
def test_a_field_of_another_type_is_told_which_is_wanted(api: Api, body: bytes, field: str, wanted: str) -> None:
    response = api.as_tenant().post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    (fault,) = response.json()["error"]["faults"]
    assert (fault["field"], fault["wanted"]) == (field, wanted)


def test_jobs_read_at_once_are_each_asked_for_by_their_own_tenant(api: Api) -> None:
    """Reads that come together share a query, which sees one tenant's rows alone."""
    jobs = {}
    for tenant in (api.take_new_tenant(), api.take_new_tenant()):
        batch = api.as_tenant(tenant).post("/v1/batches", json={"jobs": [{"prompt": "hello"}] * 30}).json()
        jobs[tenant] = batch["job_ids"]
    first, second = jobs
    asked = [(tenant, job) for tenant in jobs for job in (*jobs[first], *jobs[second])]
    clients = {tenant: api.as_tenant(tenant) for tenant in jobs}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda one: clients[one[0]].get(f"/v1/jobs/{one[1]}"), asked))
    for (tenant, job), answer in zip(asked, answers, strict=True):
        if job in jobs[tenant]:
            assert answer.status_code == 200, answer.text
            assert answer.json()["id"] == job
        else:
            assert answer.status_code == 404
