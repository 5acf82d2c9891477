"""Sharing an adapter: an explicit grant, seen by its grantee and nobody else, ended at once; the database agrees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from api_server import Api, fields_of, uuid_of
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from waiting import wait_until

from medley.config import Limits
from medley.db import grants
from medley.db.adapters import NewRevision, add_revision, hold_digest
from medley.db.connections import tenant_transaction
from medley.db.crashes import quarantine
from medley.db.demand import lane_of
from medley.db.inputs import fetch_inputs
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.store import Store
from medley.tasks.expand import Expander
from medley.tasks.maintain import maintain
from medley.tasks.orphans import Orphans

LIMITS = Limits(max_body_bytes=1 << 16, max_adapter_bytes=1 << 20)


@pytest.fixture
def owner(api: Api) -> str:
    return api.take_new_tenant()


@pytest.fixture
def friend(api: Api, owner: str) -> str:
    """The name of a tenant with whom something may be shared."""
    name = f"friend-of-{owner}"
    api.as_tenant(name)
    return name


def share(api: Api, friend: str, name: str = "a", **body: Any) -> httpx.Response:
    return api.as_tenant().post(f"/v1/adapters/{name}/grants", json={"tenant": friend, **body})


def submit(api: Api, tenant: str, adapter: str) -> httpx.Response:
    return api.as_tenant(tenant).post("/v1/jobs", json={"prompt": "x", "adapter": adapter})


def sweep(api: Api, tenant: str, *patterns: str, **fields: Any) -> httpx.Response:
    body = {"name": f"s{uuid7().hex}", "prompts": ["x"], "adapters": list(patterns), **fields}
    return api.as_tenant(tenant).post("/v1/sweeps", json=body)


def test_a_grant_lets_one_tenant_use_one_adapter_by_its_whole_name(api: Api, owner: str, friend: str) -> None:
    old, new = api.upload("a").json(), api.upload("a", folder="affine-5-8").json()
    api.upload("b")
    api.upload("a", tenant=friend)
    assert submit(api, friend, f"{owner}/a").status_code == 400
    made = share(api, friend)
    assert made.status_code == 201
    assert (made.json()["object"], made.json()["tenant"], made.json()["revision"]) == ("adapter_grant", friend, None)
    again = share(api, friend)
    assert (again.status_code, again.json()) == (200, made.json())
    job = submit(api, friend, f"{owner}/a")
    assert (job.status_code, job.json()["adapter"], job.json()["revision"]) == (201, f"{owner}/a", new["revision"])
    for pin in (old["revision"], old["digest"][:12]):
        assert submit(api, friend, f"{owner}/a@{pin}").json()["revision"] == old["revision"]
    assert submit(api, friend, "a").json()["revision"] not in (old["revision"], new["revision"])
    for reference in (f"{owner}/b", f"{owner}/a@{'0' * 8}", f"{owner}/a@rev_{'0' * 32}"):
        assert fields_of(submit(api, friend, reference)) == ["adapter"], reference
    stranger = f"stranger-to-{owner}"
    for reference in (f"{owner}/a", f"{owner}/a@{new['revision']}", f"{friend}/a"):
        assert fields_of(submit(api, stranger, reference)) == ["adapter"], reference


def test_a_grant_of_one_revision_shows_that_one_alone(api: Api, owner: str, friend: str) -> None:
    old, new = api.upload("a").json(), api.upload("a", folder="affine-5-8").json()
    assert share(api, friend, revision=old["revision"]).status_code == 201
    theirs = api.as_tenant(friend)
    assert submit(api, friend, f"{owner}/a").json()["revision"] == old["revision"]
    for pin in (new["revision"], new["digest"][:12]):
        assert fields_of(submit(api, friend, f"{owner}/a@{pin}")) == ["adapter"]
    shown = theirs.get(f"/v1/shared-adapters/{owner}/a").json()
    assert (shown["full_name"], shown["revision"], shown["num_revisions"]) == (f"{owner}/a", old["revision"], 1)
    assert new["digest"] not in theirs.get("/v1/shared-adapters").text


def test_what_is_shared_is_listed_apart_and_never_among_ones_own(api: Api, owner: str, friend: str) -> None:
    for name in ("a", "b", "c"):
        api.upload(name)
        share(api, friend, name)
    theirs = api.as_tenant(friend)
    assert theirs.get("/v1/adapters").json()["adapters"] == []
    for method, path in (("GET", "/v1/adapters/a"), ("DELETE", "/v1/adapters/a"), ("GET", "/v1/adapters/a/grants")):
        assert theirs.request(method, path).status_code == 404
    first = theirs.get("/v1/shared-adapters?limit=2").json()
    second = theirs.get("/v1/shared-adapters", params={"limit": 2, "after": first["next"]}).json()
    names = [a["full_name"] for a in first["adapters"] + second["adapters"]]
    assert names == [f"{owner}/a", f"{owner}/b", f"{owner}/c"]
    assert api.as_tenant().get("/v1/shared-adapters").json()["adapters"] == []
    for path in (f"{owner}/d", f"{owner}x/a", f"{owner}/%00", "a%00/a"):
        assert theirs.get(f"/v1/shared-adapters/{path}").status_code == 404


def test_a_sweep_takes_shared_adapters_by_patterns_with_their_tenant(api: Api, owner: str, friend: str) -> None:
    for name in ("a", "b"):
        api.upload(name)
    api.upload("own", tenant=friend)
    for pattern in (f"{owner}/*", f"{owner}/a", "*/a"):
        assert fields_of(sweep(api, friend, pattern)) == ["adapters[0]"], pattern
    share(api, friend)
    body = {"prompts": ["x", {"prompt": "y", "adapter": f"{owner}/a"}]}

    def columns_of(*patterns: str) -> list[str]:
        made = sweep(api, friend, *patterns, **body)
        assert made.status_code == 201, made.text
        return [column["adapter"] for column in made.json()["columns"]]

    assert columns_of(f"{owner}/*") == [f"{owner}/a"]
    assert columns_of("*", f"{owner}/a") == [f"{owner}/a", "own"]
    assert fields_of(sweep(api, friend, "*", **body)) == ["prompts[1].adapter"]
    assert fields_of(sweep(api, friend, f"{owner}/b")) == ["adapters[0]"]


def test_what_is_wrong_with_a_grant_is_said_at_once(api: Api, owner: str, friend: str) -> None:
    api.upload("a")
    other = api.upload("b", folder="affine-5-8").json()
    for name in ("nobody", owner, "", "A B", "x\0"):
        assert fields_of(share(api, name)) == ["tenant"], name
    assert fields_of(share(api, owner, revision=other["revision"])) == ["tenant", "revision"]
    assert fields_of(share(api, friend, revision="rev_1")) == ["revision"]
    assert fields_of(api.as_tenant().post("/v1/adapters/a/grants", json={"tenant": 1, "x": 2})) == ["x", "tenant"]
    assert share(api, friend, "none").status_code == 404
    assert api.as_tenant(friend).post("/v1/adapters/a/grants", json={"tenant": owner}).status_code == 404
    assert api.anonymous.post("/v1/adapters/a/grants", json={"tenant": owner}).status_code == 401
    assert api.as_tenant().get("/v1/adapters/a/grants").json() == {"grants": []}


def test_revoking_stops_new_jobs_at_once_and_what_waits_fails(api: Api, owner: str, friend: str) -> None:
    api.upload("a")
    share(api, friend)
    waiting = submit(api, friend, f"{owner}/a").json()
    own = submit(api, owner, "a").json()
    held = submit(api, friend, f"{owner}/a").json()
    theirs = api.as_tenant(friend)
    theirs.post(f"/v1/batches/{held['batch_id']}/pause")
    made = sweep(api, friend, f"{owner}/a").json()
    assert api.as_tenant().delete(f"/v1/adapters/a/grants/{friend}").status_code == 204
    assert api.as_tenant().delete(f"/v1/adapters/a/grants/{friend}").status_code == 404
    assert api.as_tenant().get("/v1/adapters/a/grants").json() == {"grants": []}
    assert fields_of(submit(api, friend, f"{owner}/a")) == ["adapter"]
    assert theirs.get(f"/v1/shared-adapters/{owner}/a").status_code == 404
    _end_revoked(api)
    ended = theirs.get(f"/v1/jobs/{waiting['id']}").json()
    assert (ended["state"], ended["error"]["code"]) == ("failed", "adapter_revoked")
    assert owner not in ended["error"]["message"]
    assert theirs.get(f"/v1/jobs/{held['id']}").json()["state"] == "queued"
    theirs.post(f"/v1/batches/{held['batch_id']}/resume")
    _end_revoked(api)
    assert theirs.get(f"/v1/jobs/{held['id']}").json()["error"]["code"] == "adapter_revoked"
    Expander(api.ledger.work, api.ringer, api.ledger.pool).expand(uuid_of(made["id"]))
    (result,) = theirs.get(f"/v1/batches/{made['id']}/results").json()["results"]
    assert result["error"]["code"] == "adapter_revoked"
    assert api.as_tenant().get(f"/v1/jobs/{own['id']}").json()["state"] == "queued"
    api.ledger.check()


def test_a_grant_that_still_covers_the_revision_keeps_its_jobs(api: Api, owner: str, friend: str) -> None:
    old, new = api.upload("a").json(), api.upload("a", folder="affine-5-8").json()
    share(api, friend)
    share(api, friend, revision=old["revision"])
    jobs = [
        submit(api, friend, f"{owner}/a@{revision}").json()["id"] for revision in (old["revision"], new["revision"])
    ]
    tenant = api.as_tenant()
    assert tenant.delete(f"/v1/adapters/a/grants/{friend}?revision={new['revision']}").status_code == 404
    assert fields_of(tenant.delete(f"/v1/adapters/a/grants/{friend}?revision=x")) == ["revision"]
    assert len(tenant.get("/v1/adapters/a/grants").json()["grants"]) == 2
    tenant.delete(f"/v1/adapters/a/grants/{friend}?revision={old['revision']}")
    _end_revoked(api)
    assert {api.as_tenant(friend).get(f"/v1/jobs/{job}").json()["state"] for job in jobs} == {"queued"}


def test_a_worker_does_not_run_a_job_whose_grant_was_revoked_after_its_claim(api: Api, owner: str, friend: str) -> None:
    api.upload("a")
    share(api, friend)
    job = uuid_of(submit(api, friend, f"{owner}/a").json()["id"])
    worker = api.ledger.start_worker()
    (claimed,) = [c for lane in api.ledger.demand() for c in api.ledger.claim(worker, [(lane[0], 10)]) if c.job == job]

    def is_revoked() -> bool:
        with api.ledger.working() as conn:
            (assigned,) = fetch_inputs(conn, worker, [job])
        assert assigned.tenant == api.tenant_id(friend), "caches are keyed by whose job it is"
        return assigned.is_revoked

    assert not is_revoked()
    api.as_tenant().delete(f"/v1/adapters/a/grants/{friend}")
    assert is_revoked()
    assert api.ledger.release(worker, [(claimed.job, claimed.attempt)]) == [job]
    _end_revoked(api)
    assert api.as_tenant(friend).get(f"/v1/jobs/job_{job.hex}").json()["error"]["code"] == "adapter_revoked"


def test_owner_and_grantee_have_lanes_of_their_own_and_each_pays_its_own(api: Api, owner: str, friend: str) -> None:
    revision = uuid_of(api.upload("a").json()["revision"])
    share(api, friend)
    jobs = {tenant: submit(api, tenant, f"{owner}/a").json() for tenant in (owner, friend)}
    for tenant in (owner, friend):  # each again, in the other order
        submit(api, tenant, f"{owner}/a")
    with api.ledger.working() as conn:
        rows = conn.execute(text("SELECT tenant_id, lane, revision_id, num_queued FROM demand WHERE num_queued > 0"))
        found = {(row.tenant_id, row.lane, row.num_queued) for row in rows if row.revision_id == revision}
    mine, theirs = api.tenant_id(owner), api.tenant_id(friend)
    assert found == {(mine, revision, 2), (theirs, lane_of(theirs, revision, is_shared=True), 2)}
    api.finish(jobs[friend]["batch_id"])
    assert api.as_tenant(friend).get(f"/v1/batches/{jobs[friend]['batch_id']}").json()["usage"]["completion_tokens"] > 0
    assert api.as_tenant().get(f"/v1/batches/{jobs[friend]['batch_id']}").status_code == 404
    api.ledger.check()


def test_a_quarantine_ends_the_jobs_of_owner_and_grantee(api: Api, owner: str, friend: str) -> None:
    revision = uuid_of(api.upload("a").json()["revision"])
    share(api, friend)
    jobs = {tenant: submit(api, tenant, f"{owner}/a").json()["id"] for tenant in (owner, friend)}
    with api.ledger.working() as conn:
        quarantine(conn, revision)
    for tenant, job in jobs.items():
        assert api.as_tenant(tenant).get(f"/v1/jobs/{job}").json()["error"]["code"] == "adapter_quarantined"
    api.ledger.check()


def test_the_database_shows_a_grantee_what_was_granted_and_nothing_else(api: Api, owner: str, friend: str) -> None:
    shared, other = api.upload("a").json(), api.upload("b").json()
    hidden = api.upload("a", folder="affine-5-8").json()
    share(api, friend, revision=shared["revision"])
    mine, theirs, stranger = (api.tenant_id(name) for name in (owner, friend, _stranger(api, owner)))
    submit(api, owner, "a")

    def seen(tenant: UUID, statement: str) -> set[str]:
        with tenant_transaction(api.ledger.api, tenant) as conn:
            return {str(value) for value in conn.execute(text(statement), {"owner": mine}).scalars()}

    def revisions(*adapters: dict[str, Any]) -> set[str]:
        return {str(uuid_of(adapter["revision"])) for adapter in adapters}

    names = "SELECT name FROM adapters WHERE tenant_id = :owner"
    ids = "SELECT id FROM adapter_revisions WHERE tenant_id = :owner"
    assert (seen(theirs, names), seen(theirs, ids)) == ({"a"}, revisions(shared))
    assert (seen(stranger, names), seen(stranger, ids)) == (set(), set())
    assert seen(mine, ids) == revisions(shared, other, hidden)
    for table in ("tenants", "api_keys", "batches", "jobs", "job_inputs", "demand", "sweeps"):
        column = "id" if table == "tenants" else "tenant_id"
        assert seen(theirs, f"SELECT count(*) FROM {table} WHERE {column} = :owner") == {"0"}, table
    assert seen(theirs, "SELECT count(*) FROM adapter_grants") == {"1"}
    assert seen(stranger, "SELECT count(*) FROM adapter_grants") == {"0"}
    api.as_tenant().delete(f"/v1/adapters/a/grants/{friend}")
    assert (seen(theirs, names), seen(theirs, ids)) == (set(), set())


def test_the_database_lets_nobody_grant_or_change_what_is_not_theirs(api: Api, owner: str, friend: str) -> None:
    api.upload("a")
    share(api, friend)
    mine, theirs = api.tenant_id(owner), api.tenant_id(friend)
    with tenant_transaction(api.ledger.api, mine) as conn:
        adapter = conn.execute(text("SELECT id FROM adapters WHERE name = 'a'")).scalar_one()
    stranger = _stranger(api, owner)
    insert = (
        "INSERT INTO adapter_grants (id, tenant_id, owner, adapter_id, grantee)"
        " VALUES (:id, :tenant, :owner, :adapter, :grantee)"
    )
    for tenant, name in ((theirs, friend), (mine, owner), (theirs, owner)):
        values = {"id": uuid7(), "tenant": tenant, "owner": name, "adapter": adapter, "grantee": stranger}
        with pytest.raises(DBAPIError), tenant_transaction(api.ledger.api, theirs) as conn:
            conn.execute(text(insert), values)
    for statement in (
        "UPDATE adapter_grants SET revoked_at = NULL",
        "UPDATE adapter_revisions SET uploaded_at = clock_timestamp()",
        "UPDATE adapters SET deleted_at = clock_timestamp()",
    ):
        with tenant_transaction(api.ledger.api, theirs) as conn:
            assert conn.execute(text(statement)).rowcount == 0
    with pytest.raises(DBAPIError), tenant_transaction(api.ledger.api, theirs) as conn:
        conn.execute(text("DELETE FROM adapter_grants"))


def test_a_deleted_adapter_is_shared_no_longer_even_when_it_lives_again(api: Api, owner: str, friend: str) -> None:
    api.upload("a")
    share(api, friend)
    waiting = submit(api, friend, f"{owner}/a").json()["id"]
    api.as_tenant().delete("/v1/adapters/a")
    assert fields_of(submit(api, friend, f"{owner}/a")) == ["adapter"]
    _end_revoked(api)
    assert api.as_tenant(friend).get(f"/v1/jobs/{waiting}").json()["error"]["code"] == "adapter_revoked"
    api.upload("a")
    assert fields_of(submit(api, friend, f"{owner}/a")) == ["adapter"]


def test_the_files_of_a_deleted_adapter_go_when_nothing_uses_them(api: Api, owner: str, friend: str) -> None:
    store = Store.open(api.settings.store_url)
    digest = api.upload("a", folder="caesar-3").json()["digest"]
    api.upload("same", tenant=friend, folder="caesar-3")
    job = submit(api, owner, "a").json()

    def clean() -> bool:
        with api.ledger.working() as conn:
            conn.execute(text("UPDATE adapters SET deleted_at = deleted_at - interval '1 hour'"))
        maintain(api.ledger.work, store)
        return store.has(digest)

    assert clean()
    api.as_tenant().delete("/v1/adapters/a")
    api.as_tenant(friend).delete("/v1/adapters/same")
    assert clean(), "a job waits for it"
    api.finish(job["batch_id"])
    assert not clean()
    assert api.as_tenant().get("/v1/adapters/a").status_code == 404
    assert submit(api, owner, f"a@{digest}").status_code == 400
    assert api.upload("a", folder="caesar-3").status_code == 200
    assert store.has(digest)
    assert submit(api, owner, f"a@{digest}").status_code == 201
    assert clean()
    assert submit(api, friend, "same").status_code == 400


def test_files_that_are_being_deleted_are_put_again_by_an_upload_that_waits(api: Api, owner: str) -> None:
    store = Store.open(api.settings.store_url)
    digest = api.upload("a", folder="caesar-3").json()["digest"]
    with ThreadPoolExecutor(1) as pool:
        with api.ledger.working() as conn:
            hold_digest(conn, digest, exclusive=True)
            upload = pool.submit(api.upload, "again", folder="caesar-3")
            _wait_for_lock(api)
            store.delete(digest)
        assert upload.result(timeout=20).status_code == 201
    assert store.has(digest), owner


def test_files_that_no_adapter_has_go_after_two_looks(api: Api, owner: str, tmp_path: Path) -> None:
    store = Store.open(api.settings.store_url)
    kept = api.upload("a").json()["digest"]
    (tmp_path / "weights").write_bytes(b"of an upload that was cut off")
    orphan, returning = (store.put(config, tmp_path / "weights") for config in (b"{}", b"{ }"))
    orphans = Orphans(api.ledger.work, store)
    assert orphans.look() == 0
    with tenant_transaction(api.ledger.api, api.tenant_id(owner)) as conn:
        add_revision(conn, api.tenant_id(owner), "late", NewRevision(returning, 1, 1, 1))
    assert orphans.look() == 1
    assert [store.has(digest) for digest in (kept, orphan, returning)] == [True, False, True]


def _wait_for_lock(api: Api) -> None:
    def waits() -> bool:
        statement = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        with api.ledger.working() as conn:
            return bool(conn.execute(statement).scalar_one())

    wait_until(waits, "an upload that waits")


def _stranger(api: Api, owner: str) -> str:
    name = f"stranger-to-{owner}"
    api.as_tenant(name)
    return name


def _end_revoked(api: Api) -> None:
    """What the dispatcher does each second."""
    with api.ledger.working() as conn:
        grants.end_revoked(conn, api.ledger.pool)


def test_what_runs_on_anothers_adapter_is_counted_and_retried_and_extended_as_the_callers(
    api: Api, owner: str, friend: str
) -> None:
    api.upload("a")
    share(api, friend)
    theirs = api.as_tenant(friend)
    made = sweep(api, friend, f"{owner}/a", seeds=[1]).json()
    extended = theirs.post(f"/v1/sweeps/{made['id']}/extend", json={"adapters": [f"{owner}/*"], "seeds": [2]}).json()
    assert (extended["counts"]["total"], extended["num_columns"]) == (2, 1)
    Expander(api.ledger.work, api.ringer, api.ledger.pool).expand(uuid_of(made["id"]))
    api.finish(made["id"], 1)
    api.finish(made["id"], 1, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="x"))
    path = f"/v1/batches/{made['id']}"
    assert theirs.post(f"{path}/retry").json()["counts"]["retried"] == 1
    api.finish(made["id"], 1, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="x"))
    [lane] = theirs.get(f"{path}/adapters").json()["adapters"]
    assert (lane["adapter"], lane["counts"]["total"], lane["failures"]) == (f"{owner}/a", 2, {"engine": 1})

    def used(name: str | None) -> list[tuple[Any, ...]]:
        rows = api.as_tenant(name).get("/v1/usage", params={"by": "adapter"}).json()["rows"]
        return [(row["adapter"], row["revision"], row["num_jobs"]) for row in rows]

    assert (used(friend), used(None)) == ([(f"{owner}/a", None, 3)], [])
    api.as_tenant().delete(f"/v1/adapters/a/grants/{friend}")
    assert used(friend) == [(None, made["columns"][0]["revision"], 3)], "a name that it may see no more"
    assert theirs.post(f"{path}/retry").json()["counts"]["retried"] == 1, "it would only fail again"
