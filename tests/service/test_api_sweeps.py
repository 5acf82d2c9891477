"""Sweeps over HTTP: declared once, found again by name, expanded, reported."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
import redis
from api_server import Api, fields_of
from waiting import wait_until

from medley.config import Limits
from medley.db import sweeps

LIMITS = Limits(max_jobs_per_request=1000, max_prompt_bytes=1000)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()
    for name in ("add", "sort"):
        api.upload(name)


def declare(api: Api, **fields: Any) -> dict[str, Any]:
    body = {"name": "s", "prompts": ["a", "b"], "adapters": ["*"], "max_tokens": 4} | fields
    response = api.as_tenant().post("/v1/sweeps", json=body)
    assert response.status_code == 201, response.text
    sweep: dict[str, Any] = response.json()
    return sweep


def expand(api: Api, sweep: dict[str, Any]) -> None:
    """What the task `medley.expand` does."""
    with api.ledger.working() as conn:
        while not sweeps.expand(conn, UUID(sweep["id"].partition("_")[2]), limit=3):
            pass


def test_a_sweep_is_prompts_times_adapters_times_seeds_and_the_base_where_asked_for(api: Api) -> None:
    sweep = declare(api, include_base=True, seeds=[1, 2])
    assert sweep["id"].startswith("sweep_")
    assert (sweep["object"], sweep["name"], sweep["num_prompts"], sweep["num_columns"]) == ("sweep", "s", 2, 3)
    assert [c["adapter"] for c in sweep["columns"]] == ["add", "sort", None]
    assert all((c["revision"] is None) == (c["adapter"] is None) for c in sweep["columns"])
    assert sweep["counts"]["total"] == 12
    assert sweep["num_expanded"] == 0
    expand(api, sweep)
    api.finish(sweep["id"])
    tenant = api.as_tenant()
    by_name, by_id = tenant.get("/v1/sweeps/s").json(), tenant.get(f"/v1/sweeps/{sweep['id']}").json()
    assert by_name == by_id
    assert (by_id["state"], by_id["counts"]["succeeded"], by_id["num_expanded"]) == ("finished", 12, 12)
    results = tenant.get(f"/v1/batches/{sweep['id']}/results").json()["results"]
    cells = {(r["prompt_idx"], r["adapter"], r["seed"]) for r in results}
    assert cells == {(p, a, s) for p in (0, 1) for a in ("add", "sort", None) for s in (1, 2)}
    batch = tenant.get(f"/v1/batches/{sweep['id']}").json()
    assert batch["sweep"] == {"name": "s", "num_prompts": 2, "num_columns": 3, "num_expanded": 12}
    assert [s["id"] for s in tenant.get("/v1/sweeps").json()["sweeps"]] == [sweep["id"]]
    api.ledger.check()


def test_its_creation_sends_the_expansion_to_the_tasks(api: Api, redis_url: str) -> None:
    declare(api)
    with redis.Redis.from_url(redis_url) as client:
        wait_until(lambda: client.llen("tasks") == 1)


def test_the_same_name_again_resumes_the_same_definition_and_refuses_another(api: Api) -> None:
    first = declare(api)
    body = {"adapters": ["*"], "prompts": ["a", "b"], "name": "s", "max_tokens": 4}
    again = api.as_tenant().post("/v1/sweeps", json=body)
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    for other in ({"prompts": ["a"]}, {"adapters": ["add"]}, {"max_tokens": 5}, {"seeds": [1]}):
        response = api.as_tenant().post("/v1/sweeps", json=body | other)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
    # The same name of another tenant is another sweep, and this one's cannot be seen.
    assert api.as_tenant("globex").get("/v1/sweeps/s").status_code == 404
    assert api.as_tenant("globex").get(f"/v1/sweeps/{first['id']}").status_code == 404
    assert api.as_tenant("globex").get(f"/v1/sweeps/{first['id']}/report").status_code == 404


def test_a_batch_that_is_no_sweep_is_none(api: Api) -> None:
    batch = api.as_tenant().post("/v1/batches", json={"jobs": [{"prompt": "a"}]}).json()["id"]
    assert api.as_tenant().get(f"/v1/sweeps/{batch.replace('batch', 'sweep')}").status_code == 404
    assert api.as_tenant().get("/v1/sweeps").json()["sweeps"] == []


def test_equal_creates_at_once_make_one_sweep(api: Api) -> None:
    def post(number: int) -> tuple[int, str]:
        headers = {"Idempotency-Key": f"key{number % 5}"}
        body = {"name": "s", "prompts": ["a"], "adapters": ["add"]}
        response = api.as_tenant().post("/v1/sweeps", json=body, headers=headers)
        return response.status_code, response.json().get("id", response.text)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(20)))
    assert len({sweep for _, sweep in answers}) == 1, answers
    assert {status for status, _ in answers} <= {200, 201}


def test_every_fault_of_a_sweep_is_said_at_once(api: Api) -> None:
    body = {
        "name": "a/b",
        "prompts": ["", {"prompt": "a", "prompt_token_ids": [1]}, 7, {"prompt": "a", "answer": "b"}, "x" * 1001],
        "adapters": [""],
        "seeds": [1, 1],
        "temperature": -1,
        "colour": "red",
    }
    assert {"name", "colour"} <= set(fields_of(api.as_tenant().post("/v1/sweeps", json=body)))
    body |= {"name": "s"}
    body.pop("colour")
    assert set(fields_of(api.as_tenant().post("/v1/sweeps", json=body))) == {
        "prompts[0].prompt",
        "prompts[1].prompt",
        "prompts[2]",
        "prompts[3].answer",
        "prompts[4].prompt",
        "adapters[0]",
        "seeds",
        "temperature",
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"adapters": ["none*"]}, "adapters[0]"),
        ({"adapters": ["globex/*"]}, "adapters[0]"),
        ({"adapters": []}, "adapters"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"] * 501}, "prompts"),
        ({"prompts": [{"prompt": "a", "adapter": "nobody"}]}, "prompts[0].adapter"),
        ({"prompts": [{"prompt": "a", "custom_id": "x"}, {"prompt": "a", "custom_id": "x"}]}, "prompts[1].custom_id"),
        ({"seed": 1, "seeds": [1]}, "seeds"),
        ({"seeds": [-1]}, "seeds[0]"),
        ({"name": "sweep_1"}, "name"),
    ],
)
def test_what_a_sweep_cannot_be_is_refused_by_its_field(api: Api, fields: dict[str, Any], field: str) -> None:
    body = {"name": "s", "prompts": ["a"], "adapters": ["*"]} | fields
    response = api.as_tenant().post("/v1/sweeps", json=body)
    assert (response.status_code, fields_of(response)) == (400, [field]), response.text
    assert api.as_tenant().get("/v1/sweeps/s").status_code == 404


def test_the_report_sets_the_base_beside_each_adapter_over_its_own_prompts(api: Api) -> None:
    tenant = api.as_tenant().get("/v1/tenant").json()["name"]
    sweep = declare(
        api,
        prompts=[
            {"prompt": "1", "expected": "ok", "adapter": "add"},
            {"prompt": "2", "expected": " ok\n", "adapter": f"{tenant}/add"},
            {"prompt": "3", "expected": "no", "adapter": "sort"},
            {"prompt": "4"},
        ],
        adapters=[f"{tenant}/*"],
        include_base=True,
    )
    assert sweep["counts"]["total"] == 3 * 2 + 3
    expand(api, sweep)
    empty = api.as_tenant().get("/v1/sweeps/s/report").json()["columns"]
    assert [(c["ended"], c["accuracy"], c["low"]) for c in empty] == [(0, None, None)] * 3
    api.finish(sweep["id"], text="ok")
    report = api.as_tenant().get("/v1/sweeps/s/report").json()
    assert report["sweep"]["state"] == "finished"
    add, sort, base = report["columns"]
    assert (add["adapter"], add["ended"], add["scored"], add["correct"], add["accuracy"]) == ("add", 3, 2, 2, 1.0)
    assert (add["base_scored"], add["base_correct"], add["base_accuracy"]) == (2, 2, 1.0)
    assert (sort["scored"], sort["correct"], sort["base_scored"], sort["base_correct"]) == (1, 0, 1, 0)
    assert (base["adapter"], base["ended"], base["scored"], base["correct"]) == (None, 4, 3, 2)
    assert base["completion_tokens"] == 8
    assert 0 < add["low"] < add["high"] == 1.0
