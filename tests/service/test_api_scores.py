"""Scores over HTTP: what asks for log-probabilities, how they come back, and several samples of one prompt."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import msgspec
import pytest
from api_server import Api, fields_of
from ledger import result
from sqlalchemy import text

from medley.config import Limits
from medley.db import results, sweeps
from medley.db.inputs import fetch_inputs
from medley.spec.jobs import Details, FinishReason
from medley.spec.sampling import SEED_LIMIT, sample_seed

DETAILS = Details(
    top_token_ids=(7, 8, 9, 7),
    top_logprobs=(-0.5, -1.0, -0.25, float("-inf")),
    prompt_token_ids=(1, 2, 3),
    prompt_logprobs=(-2.0, -3.0),
    prompt_top_token_ids=(4, 5),
    prompt_top_logprobs=(-0.125, -0.5),
)
LOWEST = -3.4028234663852886e38


LIMITS = Limits(max_body_bytes=8 << 20, max_prompt_bytes=1000, max_jobs_per_request=12_000)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def submit(api: Api, *jobs: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    response = api.as_tenant().post("/v1/batches", json={"jobs": jobs, "defaults": defaults})
    assert response.status_code == 201, response.text
    batch: dict[str, Any] = response.json()
    return batch


def stored(api: Api, batch: dict[str, Any]) -> list[Any]:
    statement = text(
        "SELECT i.*, j.est_tokens FROM job_inputs i JOIN jobs j ON j.id = i.job_id"
        " WHERE i.batch_id = CAST(:id AS uuid) ORDER BY job_id"
    )
    with api.ledger.working() as conn:
        return list(conn.execute(statement, {"id": batch["id"].partition("_")[2]}))


def finish(api: Api, batch: dict[str, Any], **fields: Any) -> None:
    """A worker completes every job of the batch with these fields of a result."""
    worker = api.ledger.start_worker()
    with api.ledger.working() as conn:
        lane = conn.execute(
            text("SELECT lane FROM jobs WHERE batch_id = CAST(:id AS uuid) LIMIT 1"),
            {"id": batch["id"].partition("_")[2]},
        ).scalar_one()
    claimed = api.ledger.claim(worker, [(lane, 100)])
    done = [msgspec.structs.replace(result(c.job, c.attempt), **fields) for c in claimed]
    api.ledger.store(worker, done)


def test_details_come_back_place_by_place_and_where_they_are_asked_for(api: Api) -> None:
    batch = submit(api, {"prompt": "a", "top_logprobs": 2, "prompt_logprobs": 1})
    finish(api, batch, details=DETAILS)
    tenant = api.as_tenant()
    job = tenant.get(f"/v1/jobs/{batch['job_ids'][0]}").json()["result"]
    wanted = {
        "top_token_ids": [[7, 8], [9, 7]],
        "prompt_token_ids": [1, 2, 3],
        "prompt_logprobs": [None, -2.0, -3.0],
        "prompt_top_token_ids": [None, [4], [5]],
        "prompt_top_logprobs": [None, [-0.125], [-0.5]],
    }
    assert job.pop("top_logprobs") == [[-0.5, -1.0], [-0.25, pytest.approx(LOWEST)]]
    assert {name: job[name] for name in wanted} == wanted
    assert "score" not in job
    path = f"/v1/batches/{batch['id']}/results"
    (row,) = tenant.get(path, params={"include": "tokens"}).json()["results"]
    assert {name: row[name] for name in wanted} == {name: job[name] for name in wanted}
    assert len(row["top_logprobs"]) == 2
    (bare,) = tenant.get(path).json()["results"]
    assert not set(bare) & set(wanted)
    api.ledger.check()


def test_a_plain_job_has_no_word_of_it(api: Api) -> None:
    batch = submit(api, {"prompt": "a"})
    finish(api, batch)
    tenant = api.as_tenant()
    job = tenant.get(f"/v1/jobs/{batch['job_ids'][0]}").json()
    assert set(job["result"]) == {"text", "token_ids", "logprobs", "finish_reason", "usage"}
    assert "sample_idx" not in job
    (row,) = stored(api, batch)
    assert row.sampling == {"max_tokens": 256}
    assert {row.continuation, row.continuation_token_ids, row.sample_idx} == {None}


def test_a_score_is_the_sum_and_bills_the_continuation_with_the_prompt(api: Api) -> None:
    batch = submit(api, {"prompt": "a", "continuation": " b"}, {"prompt": "a", "continuation_token_ids": [1, 2]})
    first, second = stored(api, batch)
    assert (first.continuation, second.continuation_token_ids) == (" b", [1, 2])
    assert first.est_tokens == 2
    assert second.est_tokens == 3
    finish(api, batch, logprobs=(-0.5, -0.25), finish_reason=FinishReason.SCORED, details=Details(is_greedy=True))
    tenant = api.as_tenant()
    rows = tenant.get(f"/v1/batches/{batch['id']}/results").json()["results"]
    assert [row["score"] for row in rows] == [{"logprob": -0.75, "is_greedy": True}] * 2
    job = tenant.get(f"/v1/jobs/{batch['job_ids'][0]}").json()["result"]
    assert job["score"] == {"logprob": -0.75, "is_greedy": True}
    assert job["usage"] == {"prompt_tokens": 3, "completion_tokens": 0}
    assert job["logprobs"] == [-0.5, -0.25]
    usage = tenant.get(f"/v1/batches/{batch['id']}").json()["usage"]
    assert usage == {"prompt_tokens": 6, "completion_tokens": 0}
    api.ledger.check()


def test_samples_are_jobs_with_seeds_of_their_own_that_share_a_custom_id(api: Api) -> None:
    batch = submit(
        api, {"prompt": "a", "custom_id": "x", "seed": 5}, {"prompt": "b", "n": 1}, {"prompt": "c", "n": 2}, n=3
    )
    assert batch["counts"]["total"] == 6
    rows = stored(api, batch)
    assert [(r.prompt, r.custom_id, r.sample_idx) for r in rows] == [
        ("a", "x", 0),
        ("a", "x", 1),
        ("a", "x", 2),
        ("b", None, 0),
        ("c", None, 0),
        ("c", None, 1),
    ]
    assert [r.seed for r in rows[:3]] == [sample_seed(5, i) for i in range(3)]
    assert rows[0].seed == 5
    assert len({r.seed for r in rows}) == 6
    finish(api, batch)
    tenant = api.as_tenant()
    found = tenant.get(f"/v1/batches/{batch['id']}/results").json()["results"]
    assert [row["sample_idx"] for row in found] == [0, 1, 2, 0, 0, 1]
    assert tenant.get(f"/v1/jobs/{batch['job_ids'][2]}").json()["sample_idx"] == 2
    api.ledger.check()


def test_samples_of_many_prompts_are_counted_one_by_one(api: Api) -> None:
    batch = submit(api, *({"prompt": "a"} for _ in range(90)), n=100)
    assert batch["counts"]["total"] == 9_000
    assert len(stored(api, batch)) == 9_000
    body = {"jobs": [{"prompt": "a"}] * 121, "defaults": {"n": 100}}
    assert api.as_tenant().post("/v1/batches", json=body).status_code == 413


def test_seeds_of_samples_are_seeds() -> None:
    seeds = {sample_seed(seed, i) for seed in (0, 1, SEED_LIMIT - 1) for i in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < SEED_LIMIT for seed in seeds)


@pytest.mark.parametrize(
    ("job", "fields"),
    [
        ({"prompt": "a", "continuation": ""}, ["continuation"]),
        ({"prompt": "a", "continuation": "x" * 1001}, ["continuation"]),
        ({"prompt": "a", "continuation": "x\0"}, ["continuation"]),
        ({"prompt": "a", "continuation_token_ids": []}, ["continuation_token_ids"]),
        ({"prompt": "a", "continuation_token_ids": [-1]}, ["continuation_token_ids[0]"]),
        ({"prompt": "a", "continuation": "b", "continuation_token_ids": [1]}, ["continuation"]),
        ({"prompt": "a", "continuation": "b", "n": 2}, ["n"]),
        ({"prompt": "a", "n": 0}, ["n"]),
        ({"prompt": "a", "n": 129}, ["n"]),
        ({"prompt": "a", "top_logprobs": 21}, ["top_logprobs"]),
        ({"prompt": "a", "prompt_logprobs": -1}, ["prompt_logprobs"]),
        ({"prompt": "a", "max_tokens": 0}, ["max_tokens"]),
        ({"prompt": "a", "json_schema": {"a": 1}, "regex": "a"}, ["json_schema"]),
        ({"prompt": "a", "json_schema": "{"}, ["json_schema"]),
        ({"prompt": "a", "json_schema": 1}, ["json_schema"]),
        ({"prompt": "a", "regex": ""}, ["regex"]),
        ({"prompt": "a", "choice": [""]}, ["choice[0]"]),
        ({"prompt": "a", "choice": ["b"], "min_tokens": 1}, ["min_tokens"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(api: Api, job: dict[str, Any], fields: list[str]) -> None:
    tenant = api.as_tenant()
    alone = tenant.post("/v1/jobs", json=job)
    assert alone.status_code == 400, alone.text
    assert fields_of(alone) == fields
    many = tenant.post("/v1/batches", json={"jobs": [job]})
    assert fields_of(many) == [f"jobs[0].{field}" for field in fields]


def test_several_samples_are_no_single_job(api: Api) -> None:
    refused = api.as_tenant().post("/v1/jobs", json={"prompt": "a", "n": 2, "top_p": 7})
    assert sorted(fields_of(refused)) == ["n", "top_p"]
    assert api.as_tenant().post("/v1/jobs", json={"prompt": "a", "n": 1}).status_code == 201


def test_a_schema_is_stored_as_its_text_once_judged_for_all_jobs(api: Api) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}}
    jobs = [
        {"prompt": "a", "json_schema": schema},
        {"prompt": "b"},
        {"prompt": "c", "json_schema": None, "choice": ["x"]},
    ]
    rows = stored(api, submit(api, *jobs, json_schema=schema))
    kept = '{"type":"object","properties":{"b":{"type":"string"},"a":{}}}'
    assert [row.sampling for row in rows] == [
        {"max_tokens": 256, "json_schema": kept},
        {"max_tokens": 256, "json_schema": kept},
        {"max_tokens": 256, "choice": ["x"]},
    ]


def test_a_sweep_scores_its_continuations_on_every_column(api: Api) -> None:
    name = api.take_new_tenant()
    prompts = [
        {"prompt": "a", "continuation": "bcde" * 4},
        {"prompt_token_ids": [1], "continuation_token_ids": [2, 3]},
        "c",
    ]
    body = {"name": "scored", "prompts": prompts, "include_base": True, "max_tokens": 10}
    sweep = api.as_tenant().post("/v1/sweeps", json=body).json()
    with api.ledger.working() as conn:
        assert sweeps.expand(conn, UUID(sweep["id"].partition("_")[2]), limit=10)
    assert [row.est_tokens for row in stored(api, sweep)] == [6, 3, 21]
    worker = api.ledger.start_worker()
    claimed = api.ledger.claim(worker, [(api.tenant_id(name), 3)])
    with api.ledger.working() as conn:
        found = fetch_inputs(conn, worker, [c.job for c in claimed])
    by_prompt = sorted((job.prompt or "", job.continuation) for job in found)
    assert [c and (c.text, c.token_ids) for _, c in by_prompt] == [(None, (2, 3)), ("bcde" * 4, None), None]
    bad = api.as_tenant().post(
        "/v1/sweeps", json=body | {"name": "bad", "prompts": [{"prompt": "a", "continuation": ""}]}
    )
    assert fields_of(bad) == ["prompts[0].continuation"]


def test_a_page_with_details_ends_where_they_are_large_and_the_next_goes_on(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MAX_DETAIL_BYTES", 9 << 10)
    batch = submit(api, *({"prompt": "a"} for _ in range(5)))
    many = random.Random(0)
    large = tuple(many.random() for _ in range(1_000))  # 4 KB that do not compress
    finish(api, batch, details=Details(top_token_ids=(1,) * len(large), top_logprobs=large))
    path, seen, after, finished = f"/v1/batches/{batch['id']}/results", [], 0, False
    while not finished:
        page = api.as_tenant().get(path, params={"include": "tokens", "after": after}).json()
        assert 1 <= len(page["results"]) <= 2
        seen += [row["seq"] for row in page["results"]]
        after, finished = page["next"], page["finished"]
    assert seen == [1, 2, 3, 4, 5]
    assert len(api.as_tenant().get(path).json()["results"]) == 5
