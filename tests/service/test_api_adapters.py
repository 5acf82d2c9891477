"""Adapters over HTTP: uploads judged whole, revisions, references, isolation."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from api_server import ADAPTERS, Api, adapter_files, fields_of, running_api
from sqlalchemy import text

from medley.config import Limits
from medley.spec.revisions import revision_digest
from medley.store import Store

LIMITS = Limits(max_body_bytes=1 << 16, max_adapter_bytes=1 << 20)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def test_an_upload_is_a_revision_and_the_same_files_again_are_the_same_one(api: Api) -> None:
    first = api.upload("skill.add")
    assert first.status_code == 201, first.text
    adapter = first.json()
    tenant = api.as_tenant().get("/v1/tenant").json()["name"]
    assert (adapter["name"], adapter["full_name"]) == ("skill.add", f"{tenant}/skill.add")
    assert (adapter["object"], adapter["state"], adapter["num_revisions"]) == ("adapter", "ready", 1)
    with (ADAPTERS / "add/adapter_model.safetensors").open("rb") as weights:
        digest = revision_digest((ADAPTERS / "add/adapter_config.json").read_bytes(), weights)
    assert adapter["digest"] == digest
    assert Store.open(api.settings.store_url).has(digest)
    again = api.upload("skill.add")
    assert (again.status_code, again.json()["revision"]) == (200, adapter["revision"])
    other = api.upload("skill.add", folder="affine-5-8")
    assert other.status_code == 201
    assert other.json()["num_revisions"] == 2
    assert other.json()["revision"] != adapter["revision"]
    assert api.as_tenant().get("/v1/adapters/skill.add").json() == other.json()


def test_equal_uploads_at_once_are_one_revision(api: Api) -> None:
    api.as_tenant()
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: api.upload("a"), range(8)))
    assert sorted(r.status_code for r in responses) == [200] * 7 + [201]
    assert len({r.json()["revision"] for r in responses}) == 1


def test_a_refusal_has_every_reason_and_stores_nothing(api: Api) -> None:
    config = json.loads((ADAPTERS / "add/adapter_config.json").read_text())
    config |= {"use_dora": True, "bias": "all"}
    files = adapter_files(config=json.dumps(config).encode(), weights=b"\x10\0\0\0\0\0\0\0{")
    response = api.as_tenant().put("/v1/adapters/a", files=files)
    assert response.status_code == 400
    faults = " ".join(f"{fault['field']} {fault['got']}" for fault in response.json()["error"]["faults"])
    assert "use_dora" in faults
    assert "bias" in faults
    assert "safetensors: header" in faults
    assert api.as_tenant().get("/v1/adapters").json() == {"adapters": [], "next": None}


def test_a_body_that_is_not_the_two_files_is_refused(api: Api) -> None:
    tenant, files = api.as_tenant(), adapter_files()
    missing = tenant.put("/v1/adapters/a", files={k: v for k, v in files.items() if "config" in k})
    assert fields_of(missing) == ["adapter_model.safetensors"]
    extra = tenant.put("/v1/adapters/a", files=files | {"../../etc/passwd": ("x", b"x", "text/plain")})
    assert fields_of(extra) == ["body"]
    twice = tenant.put("/v1/adapters/a", files=[*files.items(), ("adapter_config.json", ("x", b"{}", "text/plain"))])
    assert fields_of(twice) == ["body"]
    assert fields_of(tenant.put("/v1/adapters/a", json={})) == ["Content-Type"]
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    cut = tenant.put("/v1/adapters/a", content=b"--b\r\nContent-Disposition: form-data; na", headers=kind)
    assert cut.status_code == 400
    nonsense = tenant.put("/v1/adapters/a", content=b"nonsense", headers=kind)
    assert (nonsense.status_code, fields_of(nonsense)) == (400, ["body"])
    assert fields_of(tenant.put("/v1/adapters/%20a", files=files)) == ["name"]
    assert tenant.get("/v1/adapters").json()["adapters"] == []


def test_weights_beyond_the_limit_are_refused_while_they_stream(api: Api) -> None:
    files = adapter_files(weights=bytes((1 << 20) + 1))
    assert api.as_tenant().put("/v1/adapters/a", files=files).status_code == 413
    config = adapter_files(config=b" " * (257 << 10))
    assert api.as_tenant().put("/v1/adapters/a", files=config).status_code == 413


def test_adapters_are_listed_by_name_page_by_page(api: Api) -> None:
    for name in ("c", "a", "b"):
        api.upload(name)
    first = api.as_tenant().get("/v1/adapters?limit=2").json()
    assert [a["name"] for a in first["adapters"]] == ["a", "b"]
    second = api.as_tenant().get(f"/v1/adapters?limit=2&after={first['next']}").json()
    assert [a["name"] for a in second["adapters"]] == ["c"]
    assert second["next"] is None


def test_a_reference_means_a_revision_and_what_is_not_ones_own_does_not_exist(api: Api) -> None:
    old = api.upload("a").json()
    new = api.upload("a", folder="affine-5-8").json()
    api.upload("theirs", tenant="globex")
    tenant = api.as_tenant()
    name = tenant.get("/v1/tenant").json()["name"]

    def revision_of(reference: str) -> str:
        response = tenant.post("/v1/jobs", json={"prompt": "x", "adapter": reference})
        assert response.status_code == 201, response.text
        assert response.json()["adapter"] == reference
        revision: str = response.json()["revision"]
        return revision

    assert revision_of("a") == revision_of(f"{name}/a") == new["revision"]
    assert revision_of(f"a@{old['revision']}") == revision_of(f"{name}/a@{old['digest'][:8]}") == old["revision"]
    unknown = ["b", "theirs", "globex/theirs", "globex/a", "a@rev_" + "0" * 32, "a@" + "0" * 8, "a@", "", "a/b/c", "é"]
    for reference in [*unknown, "x" * 500]:
        response = tenant.post("/v1/jobs", json={"prompt": "x", "adapter": reference})
        assert (response.status_code, fields_of(response)) == (400, ["adapter"]), reference


def test_a_deleted_adapter_is_gone_until_it_is_uploaded_again(api: Api) -> None:
    tenant = api.as_tenant()
    api.upload("a")
    assert api.as_tenant("globex").delete("/v1/adapters/a").status_code == 404
    assert api.as_tenant("globex").get("/v1/adapters/a").status_code == 404
    assert tenant.delete("/v1/adapters/a").status_code == 204
    assert tenant.delete("/v1/adapters/a").status_code == 404
    assert tenant.get("/v1/adapters/a").status_code == 404
    assert tenant.post("/v1/jobs", json={"prompt": "x", "adapter": "a"}).status_code == 400
    assert api.upload("a").status_code == 200
    assert tenant.get("/v1/adapters/a").status_code == 200


def test_files_uploaded_again_are_what_the_name_means_from_then_on(api: Api) -> None:
    first = api.upload("a").json()
    api.upload("a", folder="affine-5-8")
    again = api.upload("a")
    assert again.status_code == 200
    assert again.json()["revision"] == first["revision"]
    assert api.as_tenant().get("/v1/adapters/a").json()["revision"] == first["revision"]


def test_a_quarantined_revision_takes_no_jobs(api: Api) -> None:
    revision = api.upload("a").json()["revision"]
    with api.ledger.working() as conn:
        conn.execute(
            text("UPDATE adapter_revisions SET quarantined_at = clock_timestamp() WHERE id = CAST(:id AS uuid)"),
            {"id": revision.partition("_")[2]},
        )
    tenant = api.as_tenant()
    assert tenant.get("/v1/adapters/a").json()["state"] == "quarantined"
    assert fields_of(tenant.post("/v1/jobs", json={"prompt": "x", "adapter": "a"})) == ["adapter"]
    assert fields_of(tenant.post("/v1/sweeps", json={"name": "s", "prompts": ["x"], "adapters": ["*"]})) == [
        "adapters[0]"
    ]


def test_without_a_base_model_uploads_wait_and_jobs_do_not(database: Any, redis_url: str, store_url: str) -> None:
    with running_api(database, redis_url, store_url, model=None) as api:
        assert api.upload("a").status_code == 503
        assert api.as_tenant().post("/v1/jobs", json={"prompt": "x"}).status_code == 201
