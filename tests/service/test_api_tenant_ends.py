"""A tenant that ends itself over HTTP, and what its keys open while its rows and files go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_server import Api, adapter_files

from medley.config import Limits
from medley.db import erasure
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState
from medley.store import Store
from medley.tasks.erase import end_tenants

LIMITS = Limits()


def test_a_tenant_ends_itself_over_http_by_naming_itself(api: Api) -> None:
    name = api.take_new_tenant()
    client, other = api.as_tenant(), api.as_tenant("bystander")
    assert client.get("/v1/tenant").json() == {"name": name, "retention_days": 30}
    for confirm in ({}, {"confirm": "bystander"}):
        refused = client.delete("/v1/tenant", params=confirm)
        assert refused.status_code == 400
        assert refused.json()["error"]["faults"][0]["field"] == "confirm"
    assert api.anonymous.delete("/v1/tenant", params={"confirm": name}).status_code == 401
    done = client.delete("/v1/tenant", params={"confirm": name})
    assert done.status_code == 202, done.text
    assert done.json()["delete_due_at"] > "2026"
    assert client.get("/v1/tenant").status_code == 401
    assert other.get("/v1/tenant").status_code == 200


def test_a_key_that_another_process_still_remembers_makes_nothing(api: Api) -> None:
    name = api.take_new_tenant()
    client = api.as_tenant()
    assert client.get("/v1/tenant").status_code == 200
    batch = client.post("/v1/batches", json={"jobs": [{"prompt": "p"}]}).json()["id"]
    broken = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(batch, state=JobState.FAILED, text=None, error=broken)
    body = {"name": "s", "prompts": ["a"], "include_base": True}
    assert client.post("/v1/sweeps", json=body).status_code == 201
    tenant = api.tenant_id(name)
    api.owner(lambda conn: erasure.close(conn, tenant, grace_s=3_600))
    for path, body in (
        ("/v1/jobs", {"prompt": "p"}),
        (f"/v1/batches/{batch}/retry", {}),
        ("/v1/sweeps/s/extend", {"seeds": [1]}),
    ):
        refused = client.post(path, json=body)
        assert refused.status_code in (401, 403)
        if refused.status_code == 403:
            assert refused.json()["error"]["code"] == "tenant_closing"


def test_a_key_that_is_remembered_opens_nothing_once_its_tenant_is_erased(api: Api) -> None:
    name = api.take_new_tenant()
    client = api.as_tenant()
    assert client.get("/v1/tenant").status_code == 200
    tenant = api.tenant_id(name)
    api.owner(lambda conn: erasure.close(conn, tenant, grace_s=0))
    end_tenants(api.ledger.work, Store.open(api.settings.store_url))
    wanted = {(401, "unauthorized"), (403, "tenant_closing")}
    for path, body in (
        ("/v1/jobs", {"prompt": "p"}),
        ("/v1/batches", {"jobs": [{"prompt": "p"}]}),
        ("/v1/sweeps", {"name": "s", "prompts": ["a"], "include_base": True}),
    ):
        for headers in ({}, {"Idempotency-Key": path}):
            refused = client.post(path, json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) in wanted, (path, headers)


def test_files_that_go_while_they_are_uploaded_are_stored_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.take_new_tenant()
    store = Store.open(api.settings.store_url)
    first = api.upload("mine")
    folder = Path(api.settings.store_url.removeprefix("file://"))
    [digest] = {path.parent.name for path in (folder / "sha256").glob("*/*/*.safetensors")}
    put, num_puts = Store.put, 0

    def put_and_lose(self: Store, *args: Any) -> str:
        nonlocal num_puts
        num_puts += 1
        stored = put(self, *args)
        if num_puts == 1:
            self.delete(stored)
        return stored

    monkeypatch.setattr(Store, "put", put_and_lose)
    again = api.as_tenant().put("/v1/adapters/other", files=adapter_files())
    assert (first.status_code, again.status_code, num_puts) == (201, 201, 2)
    assert store.has(digest)
