"""Keys, limits and the audit log from the client and from a terminal, by a tenant's admin key and by the operator."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from api_server import ADAPTERS, Api
from commands import Medley
from timing import keeps_to, timed
from waiting import wait_until

import medley
from medley.api import rates
from medley.client import Client


@pytest.fixture
def run(api: Api, tenant: str) -> Medley:
    return Medley(api.url, api.key(tenant))


@pytest.fixture
def operator(api: Api, monkeypatch: pytest.MonkeyPatch) -> Medley:
    """The command line of whoever has the database's owner's URL, and no key."""
    monkeypatch.setenv("MEDLEY_DATABASE_URL", api.owner_url)
    return Medley(api.url, None)


def test_a_key_does_what_its_scopes_say_and_no_more(api: Api, client: Client) -> None:
    reader = client.keys.create("reader", scopes=["read"], expires_at=datetime.now(UTC) + timedelta(days=1))
    assert reader.api_key is not None
    with Client(api.url, reader.api_key) as reading:
        assert reading.batches() == []
        for act in (
            lambda: reading.submit("hello"),
            lambda: reading.adapters.add("add", ADAPTERS / "add"),
            lambda: list(reading.keys.list()),
            lambda: list(reading.audit()),
        ):
            with pytest.raises(medley.Forbidden, match="scope"):
                act()
    worker = client.keys.create("worker")
    assert worker.api_key is not None
    with Client(api.url, worker.api_key) as working:
        working.adapters.add("add", ADAPTERS / "add")
        assert working.submit("hello", adapter="add").status.state == "queued"
        with pytest.raises(medley.Forbidden, match="scope admin"):
            working.keys.create("another")


def test_a_key_is_rotated_and_the_old_one_revoked(api: Api, client: Client) -> None:
    old = client.keys.create("ci", scopes=["read"])
    new = client.keys.rotate(old.id)
    assert (new.replaces, new.name, new.scopes) == (old.id, "ci", ("read",))
    with pytest.raises(medley.Conflict, match="rotated before"):
        client.keys.rotate(old.id)
    for key in (old, new):
        assert key.api_key is not None
        with Client(api.url, key.api_key) as either:
            assert either.tenant() == client.tenant()
    client.keys.revoke(old.id)
    assert [(k.id, k.state) for k in client.keys.list()][:2] == [(new.id, "live"), (old.id, "revoked")]
    assert client.keys.get(new.id).last_used_at is not None
    with pytest.raises(medley.NotFound):
        client.keys.revoke("mk_0000000000000000")
    assert [e.action for e in client.audit(limit=3)] == ["key.revoke", "key.rotate", "key.create"]
    assert [e.action for e in client.audit()] == ["key.revoke", "key.rotate", "key.create"]


def test_what_is_over_a_quota_is_told_at_once_and_not_tried_again(
    client: Client, tenant: str, operator: Medley
) -> None:
    assert client.limits().quotas["queued_jobs"].used == 0
    operator.lines("tenants", "limit", tenant, "--queued-jobs", "1", "--adapters", "0")
    wait_until(lambda: client.limits().quotas["queued_jobs"].limit == 1, "the new limit", 10)
    client.submit("hello")

    def refusals() -> float:
        with timed() as took:
            for act in (lambda: client.submit("hello"), lambda: client.adapters.add("add", ADAPTERS / "add")):
                with pytest.raises(medley.OverLimit, match="of this tenant is") as caught:
                    act()
                assert caught.value.code == "quota_exceeded"
        return took.seconds

    keeps_to(5, refusals)
    assert client.limits().quotas["queued_jobs"].used == 1


def test_requests_over_the_rate_are_sent_again_later(
    api: Api, tenant: str, operator: Medley, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "WINDOW_S", 1)
    key = api.key(tenant)
    operator.lines("tenants", "limit", tenant, "--requests-per-s", "3")
    started = time.monotonic()
    with Client(api.url, key) as client:
        for _ in range(8):
            assert client.tenant() == tenant
    assert time.monotonic() - started > 1, "it has waited"


def test_keys_from_a_terminal_by_an_admin_key(api: Api, run: Medley) -> None:
    [made] = run.lines("keys", "create", "ci", "--scope", "read", "--scope", "submit", "--days", "30")
    key_id = "_".join(made.split("_")[:2])
    assert Medley(api.url, made).lines("limits")[0] == "name\tused\tlimit"
    shown = dict(line.split("\t", 1) for line in Medley(api.url, made).lines("limits")[1:])
    assert shown["queued_bytes"] == "0\t17,179,869,184", "in full, as bytes are compared"
    assert Medley(api.url, made)("keys", "list").returncode == 1
    header, *rows = run.lines("keys", "list")
    assert header.split("\t")[:4] == ["id", "name", "state", "scopes"]
    assert rows[0].split("\t")[:4] == [key_id, "ci", "live", "read,submit"]
    [again] = run.json("keys", "rotate", key_id, "--old-hours", "1")
    assert isinstance(again, dict)
    assert again["api_key"].startswith(again["id"])
    assert run.lines("keys", "revoke", again["id"]) == [f"revoked {again['id']}"]
    shown = [line.split("\t") for line in run.lines("audit")[1:]]
    assert [(row[2], row[3]) for row in shown] == [
        ("key.revoke", again["id"]),
        ("key.rotate", key_id),
        ("key.create", key_id),
    ]
    assert run("keys", "create", "x", "--scope", "everything").returncode == 2
    assert run("keys", "revoke", "nonsense").returncode == 1


def test_the_operator_makes_tenants_keys_and_limits_and_is_seen_doing_it(api: Api, operator: Medley) -> None:
    name = f"made-{api.take_new_tenant()}"
    [first] = operator.lines("tenants", "add", name)
    [reader] = operator.lines("keys", "create", "reader", "--tenant", name, "--scope", "read")
    reader_id = "_".join(reader.split("_")[:2])
    with Client(api.url, reader) as client:
        assert client.tenant() == name
    [successor] = operator.json("keys", "rotate", reader_id, "--tenant", name)
    assert isinstance(successor, dict)
    assert operator("keys", "rotate", reader_id, "--tenant", name).returncode == 1
    operator.lines("keys", "revoke", reader_id, "--tenant", name)
    states = [line.split("\t")[2] for line in operator.lines("keys", "list", "--tenant", name)[1:]]
    assert states == ["live", "revoked", "live"]
    assert operator.lines("tenants", "limit", name, "--queued-jobs", "5", "--requests-per-s", "1.5") == [
        "queued_jobs: 5",
        "requests_per_s: 1.5",
    ]
    assert operator.lines("tenants", "limit", name, "--queued-jobs", "default") == ["queued_jobs: as configured"]
    rows: list[Any] = operator.json("tenants", "list")
    [mine] = [row for row in rows if row["name"] == name]
    assert mine["limits"] == {"requests_per_s": 1.5}
    assert any(line.startswith(f"{name}\t1\t0\t0\t") for line in operator.lines("tenants", "list"))
    expected = ["tenant.limit"] * 2 + ["key.revoke", "key.rotate", "key.create", "key.create", "tenant.create"]
    assert [line.split("\t")[2] for line in operator.lines("audit", "--tenant", name)[1:]] == expected
    # The tenant sees what was done to it, and by whom.
    with Client(api.url, first) as client:
        entries = list(client.audit())
    assert [e.action for e in entries] == expected
    assert all(e.key_id is None and e.details["operator"] for e in entries)


@pytest.mark.parametrize(
    "command",
    [
        ("tenants", "limit", "nobody", "--adapters", "1"),
        ("tenants", "limit", "nobody"),
        ("tenants", "limit", "nobody", "--adapters", "-1"),
        ("tenants", "limit", "nobody", "--requests-per-s", "0"),
        ("tenants", "limit", "nobody", "--requests-per-s", "nan"),
        ("tenants", "add", "No Name"),
        ("keys", "list", "--tenant", "nobody"),
        ("audit", "--tenant", "nobody"),
    ],
)
def test_what_the_operator_gets_wrong_is_said(operator: Medley, command: tuple[str, ...]) -> None:
    done = operator(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error" in done.stderr
