"""Keys over HTTP: made and shown once, listed, rotated with two that live, revoked; and what the log keeps of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_server import Api, fields_of, running_api
from sqlalchemy import text
from waiting import wait_until

from medley.api import auth
from medley.config import Limits
from medley.db import keys

LIMITS = Limits()


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


def make(api: Api, **fields: Any) -> dict[str, Any]:
    response = api.as_tenant().post("/v1/keys", json={"name": "a key", **fields})
    assert response.status_code == 201, response.text
    key: dict[str, Any] = response.json()
    return key


def status_of(api: Api, key: dict[str, Any] | str, path: str = "/v1/tenant") -> int:
    shown = key if isinstance(key, str) else key["api_key"]
    return api.anonymous.get(path, headers={"Authorization": f"Bearer {shown}"}).status_code


def test_a_key_is_shown_once_and_does_what_its_scopes_say(api: Api) -> None:
    key = make(api, name="ci", scopes=["read"])
    assert key["api_key"].startswith(f"{key['id']}_")
    assert (key["name"], key["scopes"], key["state"], key["last_used_at"]) == ("ci", ["read"], "live", None)
    assert status_of(api, key) == 200
    assert status_of(api, key, "/v1/keys") == 403
    shown = api.as_tenant().get(f"/v1/keys/{key['id']}").json()
    assert "api_key" not in shown
    assert shown["last_used_at"] is not None
    listed = api.as_tenant().get("/v1/keys").json()["keys"]
    assert key["id"] in [k["id"] for k in listed]
    secret = key["api_key"].rpartition("_")[2]
    assert secret not in api.as_tenant().get("/v1/keys").text
    assert make(api)["scopes"] == ["read", "submit", "adapters"], "management is asked for by name"


def test_the_same_create_again_makes_no_second_key_and_does_not_show_the_first(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    first, again = (api.as_tenant().post("/v1/keys", json={"name": "a"}, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code, again.headers["idempotent-replayed"]) == (201, 201, "true")
    assert again.json() == first.json() | {"api_key": None}
    assert len(api.as_tenant().get("/v1/keys").json()["keys"]) == 2


def test_what_is_wrong_with_a_key_is_said_all_at_once(api: Api) -> None:
    body = {"name": "", "scopes": ["everything"], "expires_at": "soon", "colour": 1}
    refused = api.as_tenant().post("/v1/keys", json=body)
    assert refused.status_code == 400
    assert set(fields_of(refused)) == {"name", "scopes[0]", "expires_at", "colour"}
    assert fields_of(api.as_tenant().post("/v1/keys", json={"name": "a", "scopes": []})) == ["scopes"]
    past = {"name": "a", "expires_at": "2020-01-01T00:00:00Z"}
    assert fields_of(api.as_tenant().post("/v1/keys", json=past)) == ["expires_at"]
    assert len(api.as_tenant().get("/v1/keys").json()["keys"]) == 1


def test_a_rotated_key_and_its_successor_both_work_until_the_old_one_is_revoked(api: Api) -> None:
    old = make(api, name="ci", scopes=["read", "submit"])
    new = api.as_tenant().post(f"/v1/keys/{old['id']}/rotate").json()
    assert (new["name"], new["scopes"], new["replaces"]) == ("ci", ["read", "submit"], old["id"])
    assert (status_of(api, old), status_of(api, new)) == (200, 200)
    third = api.as_tenant().post(f"/v1/keys/{old['id']}/rotate")
    assert (third.status_code, third.json()["error"]["code"]) == (409, "conflict")
    assert api.as_tenant().delete(f"/v1/keys/{old['id']}").status_code == 204
    assert api.as_tenant().delete(f"/v1/keys/{old['id']}").status_code == 204
    wait_until(lambda: status_of(api, old) == 401, "the end of the old key", 30)
    assert status_of(api, new) == 200
    assert api.as_tenant().post(f"/v1/keys/{old['id']}/rotate").status_code == 409
    assert api.as_tenant().post(f"/v1/keys/{new['id']}/rotate").status_code == 201


def test_of_many_rotations_at_once_one_makes_a_key(api: Api) -> None:
    old = make(api)
    with ThreadPoolExecutor(8) as pool:
        tenant = api.as_tenant()
        answers = list(pool.map(lambda _: tenant.post(f"/v1/keys/{old['id']}/rotate").status_code, range(8)))
    assert sorted(answers) == [201] + [409] * 7


def test_a_rotation_can_say_how_long_the_old_key_still_lives(api: Api) -> None:
    old = make(api, expires_at="2100-01-01T00:00:00Z")
    new = api.as_tenant().post(f"/v1/keys/{old['id']}/rotate", json={"old_lives_s": 0.5}).json()
    assert new["expires_at"] > "2099"
    wait_until(lambda: status_of(api, old) == 401, "the end of the old key", 30)
    assert api.as_tenant().get(f"/v1/keys/{old['id']}").json()["state"] == "expired"


def test_a_key_that_ends_is_not_remembered_beyond_its_end(
    database: Any, redis_url: str, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_S", 600.0)  # a revocation that was not foreseen would be noticed after half of it
    statement = text("SELECT to_char(clock_timestamp() + interval '4 s', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
    with running_api(database, redis_url, store_url) as api:
        key = make(api, expires_at=api.owner(lambda conn: conn.execute(statement).scalar_one()))
        wait_until(lambda: status_of(api, key) == 401, "the end of the key", 60)


def test_a_use_is_noted_once_a_while_and_not_a_request(api: Api) -> None:
    key = make(api)
    digits = key["id"].removeprefix("mk_")
    statement = text("SELECT xmin::text || ' ' || last_used_at FROM api_keys WHERE id = :id")

    def noted() -> Any:
        return api.owner(lambda conn: conn.execute(statement, {"id": digits}).scalar_one())

    assert status_of(api, key) == 200
    first = noted()
    assert first is not None
    # Another process looks the key up anew.
    with api.ledger.api.begin() as conn:
        row = keys.present(conn, key["api_key"])
    assert row is not None
    assert not row.is_use_due
    assert noted() == first


def test_there_is_a_most_of_keys_that_live(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    make(api)
    monkeypatch.setattr(keys, "MAX_LIVE_KEYS", 2)
    assert api.as_tenant().post("/v1/keys", json={"name": "a"}).status_code == 409
    monkeypatch.undo()
    make(api)


def test_what_was_done_by_hand_is_in_the_audit_log_and_what_was_refused_is_not(api: Api) -> None:
    tenant = api.as_tenant()
    key = make(api, name="ci")
    successor = tenant.post(f"/v1/keys/{key['id']}/rotate").json()
    tenant.delete(f"/v1/keys/{key['id']}")
    tenant.post("/v1/keys", json={"name": ""})
    api.upload("mine")
    tenant.delete("/v1/adapters/mine")
    tenant.delete("/v1/adapters/mine")
    job = tenant.post("/v1/jobs", json={"prompt": "a secret prompt", "custom_id": "a"}).json()
    cancelled = tenant.post(f"/v1/jobs/{job['id']}/cancel")
    batch = tenant.post("/v1/batches", json={"jobs": [{"prompt": "a secret prompt"}]}).json()["id"]
    for act in ("pause", "resume", "cancel", "cancel"):
        tenant.post(f"/v1/batches/{batch}/{act}")
    page = tenant.get("/v1/audit").json()
    entries = list(reversed(page["entries"]))
    assert [(e["action"], e["object"]) for e in entries] == [
        ("key.create", key["id"]),
        ("key.rotate", key["id"]),
        ("key.revoke", key["id"]),
        ("adapter.upload", "mine"),
        ("adapter.delete", "mine"),
        ("job.cancel", job["id"]),
        ("batch.create", batch),
        ("batch.pause", batch),
        ("batch.resume", batch),
        ("batch.cancel", batch),
    ]
    [admin] = [k["id"] for k in tenant.get("/v1/keys").json()["keys"] if k["id"] not in (key["id"], successor["id"])]
    assert {e["key_id"] for e in entries} == {admin}
    assert {e["client_address"] for e in entries} == {"127.0.0.1"}
    assert entries[5]["request_id"] == cancelled.headers["x-request-id"]
    assert len({e["request_id"] for e in entries}) == len(entries)
    assert entries[1]["details"]["successor"] == successor["id"]
    told = str(page)
    assert "secret prompt" not in told
    assert key["api_key"] not in told
    older = tenant.get("/v1/audit", params={"before": entries[2]["number"], "limit": 1}).json()
    assert [e["action"] for e in older["entries"]] == ["key.rotate"]


def test_who_calls_is_the_connections_other_end_unless_that_is_a_trusted_proxy(
    api: Api, database: Any, redis_url: str, store_url: str
) -> None:
    def seen(api: Api) -> str:
        headers = api.headers() | {"X-Forwarded-For": "203.0.113.9"}
        assert api.anonymous.post("/v1/keys", json={"name": "a"}, headers=headers).status_code == 201
        address: str = api.as_tenant().get("/v1/audit").json()["entries"][0]["client_address"]
        return address

    assert seen(api) == "127.0.0.1"
    with running_api(database, redis_url, store_url, trusted_proxies="127.0.0.1") as behind:
        assert seen(behind) == "203.0.113.9"


def test_a_request_id_is_the_services_own(api: Api) -> None:
    answers = [api.anonymous.get("/livez", headers={"X-Request-Id": "mine"}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(shown.startswith("req_") for shown in ids)
    refused: httpx.Response = api.anonymous.get("/v1/tenant")
    assert refused.headers["x-request-id"]
