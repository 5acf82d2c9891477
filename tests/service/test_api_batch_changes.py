"""Batches changed after they were made: retries, priority and deadline, and how they say that they go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from api_server import Api, fields_of
from sqlalchemy import text

from medley.config import Limits
from medley.db import crashes, forecasts, retries
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

LIMITS = Limits(max_jobs_per_request=12_000, max_prompt_bytes=1000)
BROKEN = JobError(code=ErrorCode.ENGINE, message="it broke")
TOO_LONG = JobError(code=ErrorCode.PROMPT_TOO_LONG, message="too long")


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def submit(api: Api, num_jobs: int, **fields: Any) -> str:
    jobs = [{"prompt": f"p{i}", "custom_id": f"c{i}"} for i in range(num_jobs)]
    response = api.as_tenant().post("/v1/batches", json={"jobs": jobs, **fields})
    assert response.status_code == 201, response.text
    batch: str = response.json()["id"]
    return batch


def fail(api: Api, batch: str, num_jobs: int, error: JobError = BROKEN) -> None:
    api.finish(batch, num_jobs, state=JobState.FAILED, text=None, error=error)


def retry(api: Api, batch: str, key: str | None = None, **body: Any) -> dict[str, Any]:
    headers = {} if key is None else {"Idempotency-Key": key}
    response = api.as_tenant().post(f"/v1/batches/{batch}/retry", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def read(api: Api, batch: str, path: str = "", **params: Any) -> dict[str, Any]:
    response = api.as_tenant().get(f"/v1/batches/{batch}{path}", params=params)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_failed_jobs_are_retried_in_their_batch_and_only_the_latest_count(api: Api) -> None:
    api.upload("own")
    batch = submit(api, 5, defaults={"adapter": "own", "max_tokens": 7, "seed": 3})
    fail(api, batch, 2)
    api.finish(batch, 2)
    fail(api, batch, 1, TOO_LONG)
    before = read(api, batch)
    assert (before["state"], before["counts"]["failed"]) == ("finished", 3)
    assert read(api, batch, "/adapters")["adapters"][0]["failures"] == {"engine": 2, "prompt_too_long": 1}

    after = retry(api, batch)
    assert after["state"] == "running"
    assert after["counts"] == {
        "total": 5,
        "queued_or_running": 3,
        "succeeded": 2,
        "failed": 0,
        "cancelled": 0,
        "expired": 0,
        "retried": 3,
    }
    assert after["usage"] == before["usage"]
    assert read(api, batch, "/adapters")["adapters"][0]["failures"] == {}
    api.ledger.recount()
    fail(api, batch, 1)
    api.finish(batch)
    api.ledger.recount()

    everything = read(api, batch, "/results")["results"]
    assert [r["seq"] for r in everything] == list(range(1, 9))
    by_id = {r["id"]: r for r in everything}
    superseded = [r for r in everything if r["retried_by"]]
    assert len(superseded) == 3
    for old in superseded:
        new = by_id[old["retried_by"]]
        assert (new["retry_of"], new["custom_id"], new["adapter"]) == (old["id"], old["custom_id"], old["adapter"])
        assert new["seed"] == old["seed"] == 3
    latest = read(api, batch, "/results", view="latest")
    assert latest["finished"]
    assert sorted(r["custom_id"] for r in latest["results"]) == [f"c{i}" for i in range(5)]
    assert read(api, batch)["usage"]["completion_tokens"] == 8 * 2

    again = retry(api, batch)
    assert (again["counts"]["retried"], again["counts"]["queued_or_running"]) == (4, 1)
    assert retry(api, batch)["counts"]["retried"] == 4, "what waits is retried by nobody"
    api.finish(batch)
    assert read(api, batch)["counts"]["succeeded"] == 5
    assert retry(api, batch)["state"] == "finished"
    job = api.as_tenant().get(f"/v1/jobs/{superseded[0]['id']}").json()
    assert job["retried_by"] == superseded[0]["retried_by"]
    api.ledger.recount()


def test_the_cursor_goes_on_over_a_retry_and_latest_passes_what_it_leaves_out(api: Api) -> None:
    batch = submit(api, 3)
    fail(api, batch, 3)
    first = read(api, batch, "/results", after=0)
    assert first["finished"]
    retry(api, batch)
    empty = read(api, batch, "/results", view="latest")
    assert (empty["results"], empty["next"], empty["finished"]) == ([], 3, False)
    api.finish(batch, 2)
    rest = read(api, batch, "/results", after=first["next"])
    assert [r["seq"] for r in rest["results"]] == [4, 5]
    assert not rest["finished"]
    api.finish(batch)
    paged = read(api, batch, "/results", view="latest", limit=2)
    assert ([r["seq"] for r in paged["results"]], paged["next"]) == ([4, 5], 5)
    assert read(api, batch, "/results", view="latest", after=5)["finished"]


def test_what_is_retried_can_be_chosen(api: Api) -> None:
    batch = submit(api, 4)
    fail(api, batch, 1)
    fail(api, batch, 1, TOO_LONG)
    api.as_tenant().post(f"/v1/batches/{batch}/cancel")
    assert retry(api, batch, codes="retryable")["counts"]["retried"] == 1
    assert retry(api, batch, codes=["prompt_too_long"])["counts"]["retried"] == 2
    assert retry(api, batch, states=["expired"])["counts"]["retried"] == 2
    answer = retry(api, batch, states=["cancelled", "failed"])
    assert (answer["counts"]["retried"], answer["counts"]["queued_or_running"]) == (4, 4)
    assert answer["state"] == "running", "a retry of cancelled jobs takes the cancel back"
    api.finish(batch)
    assert read(api, batch)["counts"]["succeeded"] == 4
    api.ledger.recount()


def test_a_retry_is_refused_where_its_jobs_would_only_end_again(api: Api) -> None:
    tenant = api.as_tenant()
    running = submit(api, 2)
    worker = api.ledger.start_worker()
    api.ledger.claim(worker, [(UUID(int=0), 0), (api.tenant_id(tenant.get("/v1/tenant").json()["name"]), 1)])
    tenant.post(f"/v1/batches/{running}/cancel")
    response = tenant.post(f"/v1/batches/{running}/retry", json={"states": ["cancelled"]})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
    assert "being cancelled" in response.json()["error"]["message"]

    late = submit(api, 1, deadline_at=(datetime.now(UTC) + timedelta(days=1)).isoformat())
    fail(api, late, 1)
    with api.ledger.working() as conn:
        conn.execute(text("UPDATE batches SET deadline_at = clock_timestamp() WHERE id = :id"), {"id": UUID(late[6:])})
    response = tenant.post(f"/v1/batches/{late}/retry")
    assert (response.status_code, "deadline_at" in response.json()["error"]["message"]) == (409, True)
    assert tenant.patch(f"/v1/batches/{late}", json={"deadline_at": None}).json()["deadline_at"] is None
    assert retry(api, late)["counts"]["retried"] == 1

    api.upload("bad")
    barred = submit(api, 1, defaults={"adapter": "bad"})
    fail(api, barred, 1)
    revision = tenant.get("/v1/adapters/bad").json()["revision"]
    with api.ledger.working() as conn:
        crashes.quarantine(conn, UUID(revision.removeprefix("rev_")))
    assert retry(api, barred)["counts"]["retried"] == 0
    api.upload("gone")
    deleted = submit(api, 1, defaults={"adapter": "gone"})
    fail(api, deleted, 1)
    assert tenant.delete("/v1/adapters/gone").status_code == 204
    assert retry(api, deleted)["counts"]["retried"] == 0, "a deleted adapter gets no new jobs"
    for body in ({"states": []}, {"states": ["succeeded"]}, {"codes": ["nonsense"]}, {"colour": 1}):
        assert tenant.post(f"/v1/batches/{barred}/retry", json=body).status_code == 400
    assert api.as_tenant("globex").post(f"/v1/batches/{barred}/retry").status_code == 404
    api.ledger.recount()


def test_retries_at_once_make_no_job_twice_and_a_key_is_answered_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "CHUNK", 100)
    batch = submit(api, 250)
    fail(api, batch, 250)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: retry(api, batch), range(6)))
    assert {a["counts"]["retried"] for a in answers} == {250}
    api.ledger.recount()
    fail(api, batch, 250)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: retry(api, batch, key="k"), range(4)))
    assert {a["counts"]["retried"] for a in answers} == {500}
    fail(api, batch, 250)
    assert retry(api, batch, key="k")["counts"]["queued_or_running"] == 0, "the key's retry was made before"
    response = api.as_tenant().post(
        f"/v1/batches/{batch}/retry", json={"codes": "retryable"}, headers={"Idempotency-Key": "k"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (409, "idempotency_conflict")
    api.ledger.recount()


def test_a_retry_in_a_paused_batch_waits_with_it(api: Api) -> None:
    batch = submit(api, 2)
    fail(api, batch, 1)
    api.as_tenant().post(f"/v1/batches/{batch}/pause")
    assert retry(api, batch)["state"] == "paused"
    api.ledger.recount()
    api.as_tenant().post(f"/v1/batches/{batch}/resume")
    api.finish(batch)
    assert read(api, batch)["counts"]["succeeded"] == 2
    api.ledger.recount()


def test_priority_and_deadline_of_a_running_batch_change_those_of_its_jobs(api: Api) -> None:
    tenant = api.as_tenant()
    lane = api.tenant_id(tenant.get("/v1/tenant").json()["name"])
    batch, other = submit(api, 4), submit(api, 1)
    worker = api.ledger.start_worker()
    api.ledger.claim(worker, [(lane, 1)])
    deadline = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    changed = tenant.patch(f"/v1/batches/{batch}", json={"priority": "high", "deadline_at": deadline.isoformat()})
    assert (changed.json()["priority"], changed.json()["deadline_at"]) == (
        "high",
        deadline.isoformat().replace("+00:00", "Z"),
    )
    mine = [row for row in api.ledger.jobs().values() if row.batch_id == UUID(batch[6:])]
    assert {(row.priority, row.deadline_at) for row in mine} == {(2, deadline)}
    assert {key: num for key, num in api.ledger.demand().items() if key[0] == lane} == {(lane, 2): 3, (lane, 1): 1}
    api.ledger.recount()
    kept = tenant.patch(f"/v1/batches/{batch}", json={"priority": "low"}).json()
    assert (kept["priority"], kept["deadline_at"]) == ("low", changed.json()["deadline_at"])
    tenant.post(f"/v1/batches/{batch}/pause")
    assert tenant.patch(f"/v1/batches/{batch}", json={"priority": "normal", "deadline_at": None}).status_code == 200
    api.ledger.recount()
    tenant.post(f"/v1/batches/{batch}/resume")
    api.ledger.release(worker, [(row.id, 1) for row in mine if row.state == "leased"])
    api.ledger.recount()
    assert fields_of(tenant.patch(f"/v1/batches/{batch}", json={"priority": "x", "deadline_at": "soon", "a": 1})) == [
        "a",
        "priority",
        "deadline_at",
    ]
    assert tenant.patch("/v1/batches/batch_1", json={}).status_code == 404
    assert api.as_tenant("globex").patch(f"/v1/batches/{other}", json={"priority": "low"}).status_code == 404


def test_a_batch_says_how_each_adapter_stands_how_fast_it_goes_and_when_it_ends(api: Api) -> None:
    for name in ("one", "two"):
        api.upload(name, folder="add" if name == "one" else "affine-5-8")
    jobs = [{"prompt": "p", "adapter": name} for name in ("one", "two", None) for _ in range(4)]
    tenant = api.as_tenant()
    batch = tenant.post("/v1/batches", json={"jobs": jobs}).json()["id"]
    assert (read(api, batch)["rate"], read(api, batch)["expected_at"]) == (None, None)
    api.finish(batch, 4)  # of one lane, so they end together
    assert read(api, batch)["rate"] is None, "the first ends only start the clock"
    api.finish(batch, 4)
    with api.ledger.working() as conn:  # half a minute passes
        for table, column in (("batches", "id"), ("batch_lanes", "batch_id")):
            conn.execute(
                text(
                    f"UPDATE {table} SET recent_at = recent_at - interval '30 s',"
                    f" recent_since = recent_since - interval '30 s' WHERE {column} = :id"
                ),
                {"id": UUID(batch[6:])},
            )
    shown = read(api, batch, "/adapters")
    whole, adapters = shown["batch"], shown["adapters"]
    assert 0.02 < whole["rate"] < 0.2
    with api.ledger.working() as conn:
        forecasts.write(conn, [(UUID(batch[6:]), 30.0, False)], keep_s=60)
    assert read(api, batch)["expected_at"] is not None, "as the dispatcher sees it"
    for a in adapters:
        num_left = a["counts"]["queued_or_running"]
        assert (a["rate"] is None or num_left == 0) == (a["expected_at"] is None)
    assert [a["adapter"] for a in adapters] == ["one", "two", None]
    assert sum(a["counts"]["succeeded"] for a in adapters) == whole["counts"]["succeeded"] == 8
    assert all(a["counts"]["total"] == 4 for a in adapters)
    assert all(a["usage"]["completion_tokens"] == 2 * a["counts"]["succeeded"] for a in adapters)
    tenant.post(f"/v1/batches/{batch}/pause")
    assert read(api, batch)["expected_at"] is None
    tenant.post(f"/v1/batches/{batch}/resume")
    api.finish(batch)
    done = read(api, batch, "/adapters")
    assert {(a["rate"], a["expected_at"]) for a in (done["batch"], *done["adapters"])} == {(None, None)}
    assert api.as_tenant("globex").get(f"/v1/batches/{batch}/adapters").status_code == 404
    api.ledger.recount()


def test_usage_is_what_workers_did_by_day_adapter_and_revision(api: Api) -> None:
    tenant = api.as_tenant()
    api.upload("one")
    old = submit(api, 2, defaults={"adapter": "one"})
    api.finish(old)
    api.upload("one", folder="affine-5-8")
    batch = submit(api, 3, defaults={"adapter": "one"})
    fail(api, batch, 1)
    api.finish(batch)
    retry(api, batch)
    api.finish(batch)
    base = submit(api, 1)
    api.finish(base)
    cancelled = submit(api, 1)
    tenant.post(f"/v1/batches/{cancelled}/cancel")
    today = datetime.now(UTC).date()
    usage = tenant.get("/v1/usage").json()
    one = {"num_jobs": 1, "prompt_tokens": 3, "completion_tokens": 2}
    assert usage["total"] == {name: 7 * num for name, num in one.items()}
    assert usage["rows"] == [{"day": today.isoformat(), **usage["total"]}]
    by_adapter = tenant.get("/v1/usage", params={"by": "adapter"}).json()["rows"]
    assert [(r["adapter"], r["revision"], r["num_jobs"]) for r in by_adapter] == [("one", None, 6), (None, None, 1)]
    by_revision = tenant.get("/v1/usage", params={"by": "revision"}).json()["rows"]
    assert sorted(r["num_jobs"] for r in by_revision) == [1, 2, 4]
    yesterday = (today - timedelta(days=1)).isoformat()
    assert tenant.get("/v1/usage", params={"to": yesterday}).json()["rows"] == []
    assert tenant.get("/v1/usage", params={"from": yesterday, "to": today.isoformat()}).json()["rows"] == usage["rows"]
    bad = tenant.get("/v1/usage", params={"from": "x", "by": "colour", "z": "1"})
    assert set(fields_of(bad)) == {"from", "by", "z"}
    assert api.as_tenant("globex").get("/v1/usage").json()["total"]["num_jobs"] == 0
    assert api.anonymous.get("/v1/usage").status_code == 401
    api.ledger.recount()
