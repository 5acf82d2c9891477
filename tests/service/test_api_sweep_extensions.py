"""Sweeps extended: only missing cells run, what was there stays, and a definition that lacks something is refused."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from api_server import Api, fields_of
from sqlalchemy import text

from medley.config import Limits
from medley.db import sweeps
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

LIMITS = Limits(max_jobs_per_request=100, max_prompt_bytes=1000)
FIRST = {"name": "s", "prompts": ["a", "b"], "adapters": ["add"], "seeds": [1], "max_tokens": 4}


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()
    for name in ("add", "sort"):
        api.upload(name)


def declare(api: Api, status: int = 200, **fields: Any) -> dict[str, Any]:
    response = api.as_tenant().post("/v1/sweeps", json=FIRST | fields)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def extend(api: Api, status: int = 200, **fields: Any) -> dict[str, Any]:
    response = api.as_tenant().post("/v1/sweeps/s/extend", json=fields)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def expand(api: Api, sweep: dict[str, Any], limit: int = 3) -> None:
    with api.ledger.working() as conn:
        while not sweeps.expand(conn, UUID(sweep["id"].partition("_")[2]), limit=limit):
            pass


def cells(api: Api, sweep: dict[str, Any]) -> list[tuple[str, str | None, int]]:
    """(prompt, adapter, seed) of each job, in the order in which they were made."""
    statement = text(
        "SELECT p.prompt, i.adapter, i.seed FROM job_inputs i"
        " JOIN sweep_prompts p ON p.sweep_id = i.batch_id AND p.prompt_idx = i.prompt_idx"
        " WHERE i.batch_id = :id ORDER BY i.job_id"
    )
    with api.ledger.working() as conn:
        return [tuple(row) for row in conn.execute(statement, {"id": UUID(sweep["id"].partition("_")[2])})]  # type: ignore[misc]


def test_a_definition_that_holds_more_adds_only_the_missing_cells(api: Api) -> None:
    sweep = declare(api, 201)
    expand(api, sweep)
    api.finish(sweep["id"])
    more = declare(api, prompts=["b", "c", "a"], adapters=["*"], include_base=True, seeds=[2, 1])
    assert (more["id"], more["state"]) == (sweep["id"], "running")
    assert (more["num_prompts"], more["num_columns"], more["num_expanded"]) == (3, 3, 2)
    assert (more["counts"]["total"], more["counts"]["succeeded"]) == (18, 2)
    assert [c["adapter"] for c in more["columns"]] == ["add", "sort", None]
    expand(api, more)
    made = cells(api, more)
    assert made[:2] == [("a", "add", 1), ("b", "add", 1)]
    assert len(made) == len(set(made)) == 18
    assert set(made) == set(itertools.product("abc", ("add", "sort", None), (1, 2)))
    api.finish(sweep["id"])
    report = api.as_tenant().get("/v1/sweeps/s/report").json()
    assert [(c["adapter"], c["ended"]) for c in report["columns"]] == [("add", 6), ("sort", 6), (None, 6)]
    lanes = api.as_tenant().get(f"/v1/batches/{sweep['id']}/adapters").json()["adapters"]
    assert [(a["adapter"], a["counts"]["total"]) for a in lanes] == [("add", 6), ("sort", 6), (None, 6)]
    # Every definition that it has had finds it, and adds nothing.
    for definition in ({}, {"prompts": ["b", "c", "a"], "adapters": ["*"], "include_base": True, "seeds": [2, 1]}):
        assert declare(api, **definition)["counts"]["total"] == 18
    api.ledger.recount()


def test_an_extension_names_what_is_to_be_there_and_twice_is_once(api: Api) -> None:
    sweep = declare(api, 201, prompts=["a", {"prompt": "b", "custom_id": "x"}])
    assert extend(api, seeds=[1, 5])["counts"]["total"] == 4
    assert extend(api, seeds=[1, 5])["counts"]["total"] == 4
    assert extend(api, adapters=["*"], include_base=True)["counts"]["total"] == 12
    assert extend(api, prompts=["a", "z", "z"])["counts"]["total"] == 24
    assert extend(api, prompts=["a", "z", "z"])["counts"]["total"] == 24
    expand(api, sweep)
    assert len(cells(api, sweep)) == 24
    api.finish(sweep["id"])
    assert api.as_tenant().get("/v1/sweeps/s").json()["state"] == "finished"
    api.ledger.recount()


def test_extensions_at_once_make_each_cell_once(api: Api) -> None:
    sweep = declare(api, 201)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: extend(api, seeds=[2 + i % 4], prompts=[f"p{i % 4}"]), range(8)))
    expand(api, sweep)
    made = cells(api, sweep)
    assert len(made) == len(set(made)) == 6 * 5
    api.ledger.recount()


def test_any_order_of_extensions_and_chunks_makes_each_cell_once(api: Api) -> None:
    rng = random.Random(20261122)
    only = [None, "add", "sort"]
    sweep = declare(api, 201, prompts=[{"prompt": "p0", "adapter": "add"}, "p1"])
    have = {"prompts": {("p0", "add"), ("p1", None)}, "adapters": {"add"}, "seeds": {1}}
    for number in range(2, 7):
        own = rng.choice([o for o in only if o is None or o in have["adapters"]])
        body: dict[str, Any] = {}
        if rng.random() < 0.6:
            body["prompts"] = [{"prompt": f"p{number}", **({"adapter": own} if own else {})}]
            have["prompts"].add((f"p{number}", own))
        if rng.random() < 0.4:
            body["adapters"] = ["sort"]
            have["adapters"].add("sort")
        if rng.random() < 0.4 or not body:
            body["seeds"] = [number]
            have["seeds"].add(number)
        extend(api, **body)
        if rng.random() < 0.5:
            with api.ledger.working() as conn:
                sweeps.expand(conn, UUID(sweep["id"].partition("_")[2]), limit=rng.randint(1, 4))
    expand(api, sweep, limit=2)
    expected = {
        (prompt, adapter, seed)
        for prompt, own in have["prompts"]
        for adapter in have["adapters"]
        for seed in have["seeds"]
        if own in (None, adapter)
    }
    made = cells(api, sweep)
    assert len(made) == len(expected)
    assert set(made) == expected
    api.ledger.recount()


def test_a_column_that_has_no_cell_yet_leaves_a_finished_sweep_finished(api: Api) -> None:
    sweep = declare(api, 201, prompts=[{"prompt": "p", "adapter": "add"}])
    expand(api, sweep)
    api.finish(sweep["id"])
    finished_at = api.as_tenant().get("/v1/sweeps/s").json()["finished_at"]
    extended = extend(api, adapters=["sort"])
    assert (extended["state"], extended["finished_at"], extended["counts"]["total"]) == ("finished", finished_at, 1)
    expand(api, sweep)
    assert extend(api, prompts=[{"prompt": "q", "adapter": "sort"}])["state"] == "running"
    expand(api, sweep)
    api.finish(sweep["id"])
    assert api.as_tenant().get("/v1/sweeps/s").json()["state"] == "finished"
    assert cells(api, sweep) == [("p", "add", 1), ("q", "sort", 1)]
    api.ledger.recount()


def test_new_cells_of_a_deleted_adapter_fail_and_say_so(api: Api) -> None:
    sweep = declare(api, 201, adapters=["*"])
    expand(api, sweep)
    api.finish(sweep["id"])
    assert api.as_tenant().delete("/v1/adapters/sort").status_code == 204
    assert extend(api, prompts=["c"])["counts"]["total"] == 6
    expand(api, sweep)
    page = api.as_tenant().get(f"/v1/batches/{sweep['id']}/results", params={"after": 4}).json()
    (failed,) = page["results"]
    assert (failed["adapter"], failed["state"]) == ("sort", "failed")
    assert failed["error"]["code"] == "adapter_unavailable"
    assert "deleted" in failed["error"]["message"]
    api.finish(sweep["id"])
    assert api.as_tenant().get("/v1/sweeps/s").json()["state"] == "finished"
    assert retried(api, sweep) == 0, "while it is deleted"
    assert api.upload("sort").status_code in (200, 201)
    assert retried(api, sweep) == 1
    api.finish(sweep["id"])
    api.ledger.check()


def retried(api: Api, sweep: dict[str, Any]) -> int:
    """Retries what can be; how many jobs wait then."""
    counts = api.as_tenant().post(f"/v1/batches/{sweep['id']}/retry", json={}).json()["counts"]
    return int(counts["queued_or_running"])


def test_a_column_keeps_the_revision_that_it_began_with(api: Api) -> None:
    sweep = declare(api, 201)
    api.upload("add", folder="affine-5-8")
    api.as_tenant().delete("/v1/adapters/sort")
    after = extend(api, adapters=["*"], seeds=[2])
    assert after["columns"] == sweep["columns"]
    assert after["counts"]["total"] == 4


@pytest.mark.parametrize(
    ("fields", "lacks"),
    [
        ({"prompts": ["a"]}, "not 1 of its prompts"),
        ({"prompts": ["a", {"prompt": "b", "expected": "x"}]}, "not 1 of its prompts"),
        ({"adapters": ["sort"]}, "not its adapter add"),
        ({"adapters": [], "include_base": True}, "not its adapter add"),
        ({"max_tokens": 5}, "other sampling"),
        ({"seeds": [2]}, "not its seed 1"),
    ],
)
def test_a_definition_that_lacks_something_is_another_sweep(api: Api, fields: dict[str, Any], lacks: str) -> None:
    declare(api, 201)
    error = declare(api, 409, **fields)["error"]
    assert error["code"] == "conflict"
    assert lacks in error["message"]
    assert api.as_tenant().get("/v1/sweeps/s").json()["counts"]["total"] == 2


def test_what_cannot_be_added_is_said_and_nothing_is(api: Api) -> None:
    declare(api, 201, prompts=[{"prompt": "a", "custom_id": "x"}])
    tenant = api.as_tenant()
    for body, fields in (
        ({}, ["body"]),
        ({"adapters": ["none*"], "seeds": [2]}, ["adapters[0]"]),
        ({"prompts": [""], "colour": 1}, ["colour", "prompts[0].prompt"]),
        ({"prompts": [{"prompt": "b", "custom_id": "x"}]}, ["prompts.custom_id"]),
        ({"prompts": [{"prompt": "b", "adapter": "sort"}]}, ["prompts[0].adapter"]),
        ({"prompts": ["b"] * 101}, ["prompts"]),
        ({"seeds": [3, 3]}, ["seeds"]),
    ):
        response = tenant.post("/v1/sweeps/s/extend", json=body)
        assert (response.status_code, fields_of(response)) == (400, fields), response.text
    assert tenant.get("/v1/sweeps/s").json()["counts"]["total"] == 1
    assert api.as_tenant("globex").post("/v1/sweeps/s/extend", json={"seeds": [2]}).status_code == 404
    tenant.post(f"/v1/batches/{tenant.get('/v1/sweeps/s').json()['id']}/cancel")
    assert "was cancelled" in extend(api, 409, seeds=[2])["error"]["message"]
    api.ledger.recount()


def test_a_sweep_is_retried_and_its_report_is_over_the_latest(api: Api) -> None:
    sweep = declare(api, 201, prompts=[{"prompt": "a", "expected": "ok"}, {"prompt": "b", "expected": "ok"}])
    expand(api, sweep)
    api.finish(sweep["id"], 1, text="ok")
    error = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(sweep["id"], 1, state=JobState.FAILED, text=None, error=error)
    tenant = api.as_tenant()
    before = tenant.get("/v1/sweeps/s/report").json()["columns"][0]
    assert (before["ended"], before["unsuccessful"], before["scored"]) == (2, 1, 1)
    assert tenant.post(f"/v1/batches/{sweep['id']}/retry").json()["state"] == "running"
    api.finish(sweep["id"], text="ok")
    after = tenant.get("/v1/sweeps/s/report").json()["columns"][0]
    assert (after["ended"], after["unsuccessful"], after["scored"], after["correct"]) == (2, 0, 2, 2)
    assert after["completion_tokens"] == 6
    api.ledger.recount()
