"""Batches over HTTP: arrays and files of lines, all or nothing; flags; the results cursor."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_server import Api, fields_of
from timing import keeps_to, timed

from medley.config import Limits
from medley.local.embedded import EmbeddedServers

LIMITS = Limits(max_body_bytes=8 << 20, max_prompt_bytes=1000, max_jobs_per_request=12_000)

LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def lines(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def submit(api: Api, num_jobs: int, **fields: Any) -> dict[str, Any]:
    jobs = [{"prompt": f"p{i}", "custom_id": f"c{i}"} for i in range(num_jobs)]
    response = api.as_tenant().post("/v1/batches", json={"jobs": jobs, **fields})
    assert response.status_code == 201, response.text
    batch: dict[str, Any] = response.json()
    return batch


def stored_inputs(api: Api, batch: dict[str, Any]) -> list[Any]:
    from sqlalchemy import text

    statement = text("SELECT * FROM job_inputs WHERE batch_id = CAST(:id AS uuid) ORDER BY job_id")
    with api.ledger.working() as conn:
        return list(conn.execute(statement, {"id": batch["id"].partition("_")[2]}))


def test_an_array_and_a_file_of_the_same_jobs_are_stored_alike(api: Api) -> None:
    assert api.upload("one").status_code == 201
    assert api.upload("two", folder="affine-5-8").status_code == 201
    jobs = [
        {"prompt": "a", "custom_id": "x"},
        {"prompt_token_ids": [1, 2, 3], "adapter": None, "seed": 5},
        {"prompt": "é\n\t\"'", "adapter": "two", "temperature": 0.5, "logit_bias": {"3": 1.5}, "stop": ["\n"]},
    ]
    defaults = {"adapter": "one", "max_tokens": 9}
    tenant = api.as_tenant()
    array = tenant.post("/v1/batches", json={"name": "n", "priority": "high", "defaults": defaults, "jobs": jobs})
    params = {"name": "n", "priority": "high", "defaults": json.dumps(defaults)}
    file = tenant.post("/v1/batches", content=lines(jobs), headers=LINES, params=params)
    stored = []
    for response in (array, file):
        assert response.status_code == 201, response.text
        batch = response.json()
        assert (batch["object"], batch["name"], batch["priority"], batch["state"]) == ("batch", "n", "high", "running")
        assert batch["counts"]["total"] == batch["counts"]["queued_or_running"] == 3
        rows = stored_inputs(api, batch)
        assert ["job_" + row.job_id.hex for row in rows] == batch["job_ids"]
        stored.append([(r.prompt, r.prompt_token_ids, r.adapter, r.sampling, r.custom_id) for r in rows])
        assert rows[1].seed == 5
        assert rows[0].seed != rows[2].seed
    assert stored[0] == stored[1]
    assert [row[2] for row in stored[0]] == ["one", None, "two"]
    assert stored[0][0][3] == {"max_tokens": 9}
    assert stored[0][2][3] == {"max_tokens": 9, "temperature": 0.5, "logit_bias": {"3": 1.5}, "stop": ["\n"]}
    api.ledger.check()


def test_a_file_with_bad_lines_lists_them_all_and_queues_nothing(api: Api) -> None:
    rows: list[Any] = [{"prompt": f"p{i}", "custom_id": f"c{i}"} for i in range(7000)]
    rows[10] = {"prompt": "a", "custom_id": "c3"}
    rows[20] = {"prompt": "a", "adapter": "nobody"}
    rows[30] = {"prompt": "a", "max_tokens": 0, "colour": 1}
    rows[6000] = {"prompt": ["a"]}
    rows[6500] = {"prompt": "a", "priority": "high"}
    body = lines(rows).replace(b'{"prompt": "p40", "custom_id": "c40"}', b'{"prompt": "p40", ')
    num_jobs = len(api.ledger.jobs())
    response = api.as_tenant().post("/v1/batches", content=body, headers=LINES)
    assert response.status_code == 400
    found = {(fault["line"], fault["field"]) for fault in response.json()["error"]["faults"]}
    assert found == {
        (11, "custom_id"),
        (21, "adapter"),
        (31, "max_tokens"),
        (31, "colour"),
        (41, "body"),
        (6001, "prompt"),
        (6501, "priority"),
    }
    assert len(api.ledger.jobs()) == num_jobs
    assert api.as_tenant().get("/v1/batches").json()["batches"] == []
    api.ledger.check()


def test_an_array_names_its_bad_jobs_by_their_index(api: Api) -> None:
    body = {"name": "", "priority": "x", "defaults": {"max_tokens": 0, "adapter": "no"}, "jobs": [{"prompt": "a"}, {}]}
    response = api.as_tenant().post("/v1/batches", json=body)
    assert set(fields_of(response)) == {
        "name",
        "priority",
        "defaults.max_tokens",
        "defaults.adapter",
        "jobs[1].prompt",
    }


def test_a_thousand_faults_are_listed_and_the_rest_is_counted(api: Api) -> None:
    response = api.as_tenant().post("/v1/batches", content=b"x\n" * 1500, headers=LINES)
    error = response.json()["error"]
    assert len(error["faults"]) == 1000
    assert "1500 faults" in error["message"]
    assert "500 more" in error["message"]


@pytest.mark.parametrize("body", [b"", b"\n\n"])
def test_a_file_without_jobs_is_refused(api: Api, body: bytes) -> None:
    response = api.as_tenant().post("/v1/batches", content=body, headers=LINES)
    assert (response.status_code, fields_of(response)) == (400, ["jobs"])


def test_blank_lines_and_carriage_returns_and_a_missing_last_newline_do_no_harm(api: Api) -> None:
    body = b'{"prompt": "a"}\r\n\n{"prompt": "b"}\n   \n{"prompt": "c"}'
    batch = api.as_tenant().post("/v1/batches", content=body, headers=LINES).json()
    assert [row.prompt for row in stored_inputs(api, batch)] == ["a", "b", "c"]


def test_limits_on_jobs_and_lines_hold_while_parsing(api: Api) -> None:
    many = api.as_tenant().post("/v1/batches", content=b'{"prompt":"a"}\n' * 12_001, headers=LINES)
    assert many.status_code == 413
    array = api.as_tenant().post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 12_001})
    assert array.status_code == 413
    long = api.as_tenant().post("/v1/batches", content=b"x" * (3 << 20), headers=LINES)
    assert long.status_code == 413
    prompts = api.as_tenant().post("/v1/batches", content=lines([{"prompt": "a" * 1001}] * 3), headers=LINES)
    assert fields_of(prompts) == ["prompt"] * 3


def test_a_batch_of_many_chunks_is_whole_and_its_ids_are_left_out(api: Api) -> None:
    def body() -> Iterator[bytes]:
        for i in range(12_000):
            yield b'{"prompt": "a prompt", "custom_id": "c%d"}\n' % i

    batch = api.as_tenant().post("/v1/batches", content=body(), headers=LINES).json()
    assert batch["counts"]["total"] == 12_000
    assert "job_ids" not in batch
    assert [row.custom_id for row in stored_inputs(api, batch)] == [f"c{i}" for i in range(12_000)]
    lane = (api.tenant_id(api.as_tenant().get("/v1/tenant").json()["name"]), 1)
    assert api.ledger.demand()[lane] == 12_000


def test_a_cut_upload_queues_nothing(api: Api) -> None:
    num_jobs = len(api.ledger.jobs())

    def body() -> Iterator[bytes]:
        yield b'{"prompt": "a"}\n' * 6000
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        api.as_tenant().post("/v1/batches", content=body(), headers=LINES)
    assert api.as_tenant().get("/v1/batches").json()["batches"] == []
    assert len(api.ledger.jobs()) == num_jobs


def test_batches_are_listed_newest_first_and_page_by_page(api: Api) -> None:
    ids = [submit(api, 1, name=f"b{i}")["id"] for i in range(5)]
    first = api.as_tenant().get("/v1/batches?limit=3").json()
    assert [b["id"] for b in first["batches"]] == ids[:1:-1]
    second = api.as_tenant().get(f"/v1/batches?limit=3&before={first['next']}").json()
    assert [b["id"] for b in second["batches"]] == ids[1::-1]
    assert second["next"] is None
    refused = api.as_tenant().get("/v1/batches?limit=0&before=x")
    assert set(fields_of(refused)) == {"limit", "before"}


def test_a_paused_batch_is_held_and_goes_on_and_a_cancelled_one_ends(api: Api) -> None:
    tenant, batch = api.as_tenant(), submit(api, 5)["id"]
    assert tenant.post(f"/v1/batches/{batch}/pause").json()["state"] == "paused"
    assert api.finish(batch) == []
    assert tenant.post(f"/v1/batches/{batch}/resume").json()["state"] == "running"
    assert len(api.finish(batch, 2)) == 2
    cancelled = tenant.post(f"/v1/batches/{batch}/cancel").json()
    assert cancelled["state"] == "finished"
    assert cancelled["counts"] == {
        "total": 5,
        "queued_or_running": 0,
        "succeeded": 2,
        "failed": 0,
        "cancelled": 3,
        "expired": 0,
        "retried": 0,
    }
    assert cancelled["usage"] == {"prompt_tokens": 6, "completion_tokens": 4}
    for verb in ("cancel", "pause", "resume"):
        assert tenant.post(f"/v1/batches/{batch}/{verb}").json()["state"] == "finished"
    # A sweep's id names the same batch.
    assert tenant.get(f"/v1/batches/{batch.replace('batch', 'sweep')}").json()["id"] == batch
    api.ledger.check()


def test_the_cursor_gives_each_result_once_in_order_while_workers_complete(api: Api) -> None:
    batch = submit(api, 300)["id"]
    results: list[dict[str, Any]] = []

    def read() -> None:
        after, finished = 0, False
        while not finished:
            page = api.as_tenant().get(f"/v1/batches/{batch}/results?after={after}&limit=7&wait=20").json()
            results.extend(page["results"])
            assert page["results"] or page["finished"], "a wait of 20 s ends with something"
            after, finished = page["next"], page["finished"]

    with ThreadPoolExecutor(4) as pool:
        reading = pool.submit(read)
        writing = [pool.submit(lambda: [api.finish(batch, 10) for _ in range(10)]) for _ in range(3)]
        for write in writing:
            write.result(timeout=60)
        api.finish(batch)
        reading.result(timeout=60)
    assert [r["seq"] for r in results] == list(range(1, 301))
    assert {r["custom_id"] for r in results} == {f"c{i}" for i in range(300)}
    assert len({r["id"] for r in results}) == 300
    api.ledger.check()


def test_results_have_tokens_only_where_asked_for_and_come_as_lines_too(api: Api) -> None:
    tenant, batch = api.as_tenant(), submit(api, 3)["id"]
    api.finish(batch, 2, text="ok")
    page = tenant.get(f"/v1/batches/{batch}/results").json()
    assert (page["next"], page["finished"], len(page["results"])) == (2, False, 2)
    assert "token_ids" not in page["results"][0]
    assert page["results"][0]["text"] == "ok"
    whole = tenant.get(f"/v1/batches/{batch}/results?include=tokens&limit=1").json()["results"]
    assert [r["token_ids"] for r in whole] == [[7, 7]]
    file = tenant.get(f"/v1/batches/{batch}/results?after=1", headers={"Accept": "application/x-ndjson"})
    assert [json.loads(line)["seq"] for line in file.text.splitlines()] == [2]
    assert (file.headers["x-medley-next"], file.headers["x-medley-finished"]) == ("2", "false")
    api.finish(batch)
    last = tenant.get(f"/v1/batches/{batch}/results?after=2").json()
    assert (last["next"], last["finished"]) == (3, True)
    after = tenant.get(f"/v1/batches/{batch}/results?after=3&wait=30").json()
    assert after == {"results": [], "next": 3, "finished": True}
    for bad in ("after=-1", "limit=10001", "include=everything", "wait=x"):
        assert tenant.get(f"/v1/batches/{batch}/results?{bad}").status_code == 400


def test_a_waiting_cursor_returns_what_comes_and_a_cancel_wakes_it(api: Api) -> None:
    batch = submit(api, 3)["id"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.as_tenant().get, f"/v1/batches/{batch}/results?wait=30")
        threading.Event().wait(0.2)
        api.finish(batch, 1)
        assert [r["seq"] for r in waiting.result(timeout=5).json()["results"]] == [1]
        waiting = pool.submit(api.as_tenant().get, f"/v1/batches/{batch}/results?after=1&wait=30")
        threading.Event().wait(0.2)
        assert api.as_tenant().post(f"/v1/batches/{batch}/cancel").status_code == 200
        page = waiting.result(timeout=5).json()
    assert [r["state"] for r in page["results"]] == ["cancelled", "cancelled"]
    assert page["finished"] is True


def test_waiters_return_within_about_a_second_while_redis_is_down(api: Api, embedded: EmbeddedServers) -> None:
    embedded.stop("redis")
    try:
        assert api.anonymous.get("/readyz").json() == {
            "postgres": True,
            "migrations": True,
            "redis": False,
            "model": True,
        }

        def create() -> float:
            """As durable, and as quick, as ever."""
            with timed() as took:
                submit(api, 1)
            return took.seconds

        def wait() -> float:
            batch = submit(api, 1)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(api.as_tenant().get, f"/v1/jobs/{batch['job_ids'][0]}?wait=30")
                threading.Event().wait(0.2)
                api.finish(batch["id"])
                with timed() as took:
                    assert waiting.result(timeout=60).json()["state"] == "succeeded"
            return took.seconds

        keeps_to(3, wait)
        keeps_to(2, create)
    finally:
        embedded.start_redis()


def test_a_replayed_file_is_the_same_batch_and_a_changed_one_a_conflict(api: Api) -> None:
    def post(body: bytes) -> httpx.Response:
        return api.as_tenant().post("/v1/batches", content=body, headers=LINES | {"Idempotency-Key": "file"})

    first, again = post(b'{"prompt":"a"}\n'), post(b'{"prompt":"a"}\n')
    assert first.json()["job_ids"] == again.json()["job_ids"]
    assert again.headers["idempotent-replayed"] == "true"
    assert post(b'{"prompt":"b"}\n').status_code == 409
