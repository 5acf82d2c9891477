"""Sweeps compared: over the prompts that both have, by adapter, with the statistics of pairs."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
import scipy.stats
from api_server import Api, fields_of
from ledger import result
from sqlalchemy import text

from medley.config import Limits
from medley.db import sweeps
from medley.spec.ids import uuid7

LIMITS = Limits(max_jobs_per_request=2_000, max_prompt_bytes=1000)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()
    for name in ("add", "sort"):
        api.upload(name)


def run(api: Api, name: str, prompts: list[Any], answers: Any, **fields: Any) -> str:
    """A sweep whose cell (prompt, adapter, seed) is answered by `answers`; None: it fails."""
    body = {"name": name, "prompts": prompts, "adapters": ["*"], "max_tokens": 4} | fields
    response = api.as_tenant().post("/v1/sweeps", json=body)
    assert response.status_code == 201, response.text
    sweep: str = response.json()["id"]
    batch = UUID(sweep.partition("_")[2])
    statement = text(
        "SELECT j.id, j.lane, p.prompt, i.adapter, i.seed FROM jobs j JOIN job_inputs i ON i.job_id = j.id"
        " JOIN sweep_prompts p ON p.sweep_id = j.batch_id AND p.prompt_idx = i.prompt_idx WHERE j.batch_id = :id"
    )
    with api.ledger.working() as conn:
        while not sweeps.expand(conn, batch, limit=500):
            pass
        cells = {row.id: row for row in conn.execute(statement, {"id": batch})}
    worker = api.ledger.start_worker()
    claimed = api.ledger.claim(worker, [(lane, len(cells)) for lane in {row.lane for row in cells.values()}])
    ended = []
    for claim in claimed:
        row = cells[claim.job]
        said = answers(row.prompt, row.adapter, row.seed)
        state = {"state": "failed", "text": None} if said is None else {"text": said}
        ended.append(result(claim.job, claim.attempt, **state))
    api.ledger.store(worker, ended)
    return sweep


def diff(api: Api, sweep: str, **params: Any) -> list[dict[str, Any]]:
    response = api.as_tenant().get(f"/v1/sweeps/{sweep}/diff", params=params)
    assert response.status_code == 200, response.text
    columns: list[dict[str, Any]] = response.json()["columns"]
    return columns


def test_each_adapter_is_compared_with_the_base_over_all_prompts(api: Api) -> None:
    rng = random.Random(5)
    said = {(p, a): rng.random() < share for p in range(60) for a, share in (("add", 0.8), ("sort", 0.5), (None, 0.4))}
    prompts = [{"prompt": f"p{i}", "expected": "yes"} for i in range(60)]
    run(api, "s", prompts, lambda p, a, _: " yes\n" if said[int(p[1:]), a] else "no", include_base=True)
    columns = diff(api, "s")
    assert [(c["adapter"], c["with_adapter"]) for c in columns] == [("add", None), ("sort", None)]
    ps = []
    for column in columns:
        mine = [said[p, column["adapter"]] for p in range(60)]
        base = [said[p, None] for p in range(60)]
        only = sum(m and not b for m, b in zip(mine, base, strict=True))
        only_base = sum(b and not m for m, b in zip(mine, base, strict=True))
        assert (column["wins"], column["losses"], column["ties"]) == (only, only_base, 60 - only - only_base)
        assert (column["prompts"], column["pairs"]) == (60, 60)
        assert column["difference"] == pytest.approx((sum(mine) - sum(base)) / 60)
        ps.append(scipy.stats.binomtest(only, only + only_base).pvalue)
        assert column["p"] == pytest.approx(ps[-1])
        assert column["low"] < column["difference"] < column["high"]
    first, second = sorted(ps)
    assert sorted(c["p_adjusted"] for c in columns) == pytest.approx(
        [min(1, 2 * first), max(min(1, 2 * first), second)]
    )
    assert diff(api, "s") == columns, "the interval is that of its seed"
    assert diff(api, "s", seed=1)[0]["low"] is not None
    (one,) = diff(api, "s", adapter="sort", with_adapter="add")
    assert one["difference"] == pytest.approx(columns[1]["difference"] - columns[0]["difference"])


def test_two_sweeps_are_compared_over_the_prompts_that_they_share(api: Api) -> None:
    old = [{"prompt": f"old {i}", "custom_id": f"id{i}", "expected": "1"} for i in range(6)] + [
        {"prompt": "same", "expected": "1"},
        {"prompt": "same", "expected": "1"},
        {"prompt": "other answer", "expected": "1"},
        {"prompt": "not scored"},
    ]
    new = [{"prompt": f"new {i}", "custom_id": f"id{i}", "expected": "1"} for i in reversed(range(2, 9))] + [
        {"prompt": "same", "expected": "1"},
        {"prompt": "other answer", "expected": "2"},
        {"prompt": "not scored"},
    ]
    run(api, "before", old, lambda p, a, _: "1" if a == "add" or p == "old 5" else "0", include_base=True)
    run(api, "after", new, lambda p, *_: None if p == "new 2" else "1", adapters=["sort", "add"])
    columns = diff(api, "after", **{"with": "before"})
    assert [(c["adapter"], c["with_adapter"]) for c in columns] == [("add", "add"), ("sort", "sort")]
    # id3, id4, id5 and one `same`: id2 has failed, and the rest is in one of them alone or expects another answer.
    assert [c["prompts"] for c in columns] == [4, 4]
    assert (columns[0]["difference"], columns[1]["difference"]) == (0.0, 0.75)
    (against,) = diff(api, "after", **{"with": "before", "adapter": "sort", "with_adapter": "(base)"})
    assert (against["with_adapter"], against["wins"]) == (None, 3)


def test_seeds_are_paired_and_a_prompt_counts_once(api: Api) -> None:
    prompts = [{"prompt": f"p{i}", "expected": "1"} for i in range(3)]
    run(api, "one", prompts, lambda _p, _a, s: "1" if s == 2 else "0", adapters=["add"], seeds=[1, 2])
    run(api, "two", prompts, lambda _p, _a, s: "1" if s == 3 else "0", adapters=["add"], seeds=[2, 3])
    (column,) = diff(api, "one", **{"with": "two"})
    assert (column["prompts"], column["pairs"], column["difference"]) == (3, 3, 1.0)
    run(api, "drawn", prompts, lambda *_: "1", adapters=["add"])
    (column,) = diff(api, "drawn", **{"with": "one"})
    assert (column["prompts"], column["pairs"]) == (3, 3), "drawn seeds pair by their place"
    run(api, "both", prompts, lambda _, a, s: "1" if (a == "add") == (s == 1) else "0", seeds=[1, 2])
    (column,) = diff(api, "both", adapter="add", with_adapter="sort")
    assert (column["prompts"], column["pairs"], column["ties"], column["p"]) == (3, 6, 3, 1.0)


def test_what_cannot_be_compared_is_said(api: Api) -> None:
    prompts = [{"prompt": "p", "expected": "1"}]
    run(api, "s", prompts, lambda *_: "1", adapters=["add"])
    run(api, "t", prompts, lambda *_: "1", adapters=["sort"])
    tenant = api.as_tenant()
    assert "no base" in tenant.get("/v1/sweeps/s/diff").json()["error"]["message"]
    assert tenant.get("/v1/sweeps/s/diff", params={"with": "t"}).status_code == 409
    response = tenant.get("/v1/sweeps/s/diff", params={"adapter": "x", "with_adapter": "(base)"})
    assert (response.status_code, fields_of(response)) == (400, ["adapter", "with_adapter"])
    assert fields_of(tenant.get("/v1/sweeps/s/diff", params={"adapter": "add", "with_adapter": "add"})) == ["adapter"]
    assert tenant.get("/v1/sweeps/s/diff", params={"with": "nobody"}).status_code == 404
    assert api.as_tenant("globex").get("/v1/sweeps/s/diff", params={"with": "t"}).status_code == 404
    assert tenant.get(f"/v1/sweeps/s/diff?with={uuid7().hex}").status_code == 404
