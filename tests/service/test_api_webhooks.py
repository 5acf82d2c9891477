"""Webhooks: registered over HTTP, written with what they tell of, signed, retried, and given up."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import standardwebhooks
from api_server import Api, fields_of
from receiver import TEST_CERTIFICATE, Receiver, receiving
from sqlalchemy import text
from waiting import wait_until

from medley import endpoints
from medley.config import Limits
from medley.db import crashes, erasure, sweeps, webhooks
from medley.db.connections import make_engine, transaction
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState
from medley.spec.webhooks import BadSignature, verify
from medley.tasks.deliver import RETRY_S, Deliverer
from medley.tasks.erase import stop

LIMITS = Limits()
WEBHOOK_LOOPBACK = True


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()
    with api.ledger.working() as conn:
        for table in ("webhook_deliveries", "webhooks"):
            conn.execute(text(f"DELETE FROM {table}"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def deliverer(api: Api) -> Iterator[Deliverer]:
    made = Deliverer(api.ledger.work, allow_loopback=True)
    yield made
    made.close()


def register(api: Api, receiver: Receiver, *events: str, **fields: Any) -> dict[str, Any]:
    body = {"url": f"{receiver.url}/hook?a=b", "events": list(events), **fields}
    response = api.as_tenant().post("/v1/webhooks", json=body)
    assert response.status_code == 201, response.text
    webhook: dict[str, Any] = response.json()
    return webhook


def deliveries(api: Api, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.as_tenant().get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["deliveries"]
    return found


def send_due(api: Api, deliverer: Deliverer) -> int:
    """Sends what is due until nothing is. Returns how many attempts were made."""
    num = 0
    while True:
        with api.ledger.working() as conn:
            due = webhooks.read_due(conn)
        if not due:
            return num
        for delivery in due:
            deliverer.deliver(delivery)
            num += 1


def make_due(api: Api, webhook: dict[str, Any]) -> None:
    with api.ledger.working() as conn:
        conn.execute(
            text(
                "UPDATE webhook_deliveries SET due_at = clock_timestamp() WHERE webhook_id = :id AND state = 'pending'"
            ),
            {"id": UUID(webhook["id"].removeprefix("wh_"))},
        )


def submit(api: Api, num_jobs: int) -> str:
    body = {"name": "mine", "jobs": [{"prompt": "a secret prompt"}] * num_jobs}
    batch: str = api.as_tenant().post("/v1/batches", json=body).json()["id"]
    return batch


def test_a_batchs_end_is_told_once_signed_and_again_after_a_retry(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished", "batch.failing", failed_jobs=2)
    other = register(api, receiver, "sweep.finished", "adapter.quarantined")
    batch = submit(api, 4)
    api.finish(batch, 1, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="x"))
    assert deliveries(api, webhook) == []
    api.finish(batch, 2, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="x"))
    api.finish(batch)
    assert [d["event"] for d in deliveries(api, webhook)] == ["batch.finished", "batch.failing"]
    assert deliveries(api, other) == []
    assert send_due(api, deliverer) == 2
    failing, finished = receiver.received
    assert (failing.event["type"], failing.event["data"]["counts"]["failed"]) == ("batch.failing", 3)
    assert finished.path == "/hook?a=b"
    verified = standardwebhooks.Webhook(webhook["secret"]).verify(finished.body, finished.headers)
    assert verified == finished.event
    verify(finished.body, finished.headers, webhook["secret"])
    assert finished.event["type"] == "batch.finished"
    data = finished.event["data"]
    shown = api.as_tenant().get(f"/v1/batches/{batch}").json()
    assert (data["id"], data["name"], data["counts"], data["usage"]) == (
        batch,
        "mine",
        shown["counts"],
        shown["usage"],
    )
    assert b"secret prompt" not in finished.body
    assert {d["state"] for d in deliveries(api, webhook)} == {"delivered"}
    api.as_tenant().post(f"/v1/batches/{batch}/retry")
    api.finish(batch)
    assert send_due(api, deliverer) == 1
    assert receiver.received[-1].event["data"]["counts"]["retried"] == 3
    with pytest.raises(BadSignature):
        verify(finished.body + b" ", finished.headers, webhook["secret"])
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(other["secret"]).verify(finished.body, finished.headers)


def test_sweeps_and_quarantines_are_told_and_jobs_by_themselves_are_not(api: Api, receiver: Receiver) -> None:
    api.upload("add")
    everything = ["batch.finished", "sweep.finished", "adapter.quarantined"]
    webhook = register(api, receiver, *everything)
    job = api.as_tenant().post("/v1/jobs", json={"prompt": "a"}).json()
    api.finish(job["batch_id"])
    body = {"name": "s", "prompts": ["a"], "adapters": ["add"]}
    sweep = api.as_tenant().post("/v1/sweeps", json=body).json()
    with api.ledger.working() as conn:
        sweeps.expand(conn, UUID(sweep["id"].removeprefix("sweep_")), limit=10)
    api.finish(sweep["id"])
    revision = api.as_tenant().get("/v1/adapters/add").json()["revision"]
    with api.ledger.working() as conn:
        crashes.quarantine(conn, UUID(revision.removeprefix("rev_")))
    quarantined, finished = (d["payload"] for d in deliveries(api, webhook))
    assert (finished["type"], finished["data"]["id"], finished["data"]["name"]) == ("sweep.finished", sweep["id"], "s")
    assert (quarantined["data"]["name"], quarantined["data"]["revision"]) == ("add", revision)


def test_one_batch_may_have_an_endpoint_of_its_own_also_after_its_end(api: Api, receiver: Receiver) -> None:
    first, second = submit(api, 1), submit(api, 1)
    webhook = register(api, receiver, "batch.finished", batch_id=second)
    api.finish(first)
    assert deliveries(api, webhook) == []
    api.as_tenant().post(f"/v1/batches/{second}/cancel")
    assert [d["payload"]["data"]["counts"]["cancelled"] for d in deliveries(api, webhook)] == [1]
    late = register(api, receiver, "batch.finished", batch_id=first)
    assert [d["payload"]["data"]["id"] for d in deliveries(api, late)] == [first]


def test_endpoints_of_batches_that_have_finished_do_not_count_to_the_limit(
    api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.api.webhooks.MAX_OF_BATCHES", 1)
    old, running = submit(api, 1), submit(api, 1)
    register(api, receiver, "batch.finished", batch_id=old)
    body = {"url": receiver.url, "events": ["batch.finished"], "batch_id": running}
    assert api.as_tenant().post("/v1/webhooks", json=body).status_code == 409
    api.finish(old)
    register(api, receiver, "batch.finished", batch_id=running)


def test_what_is_not_taken_is_sent_again_under_the_same_id_and_at_last_given_up(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished")
    api.finish(submit(api, 1))
    receiver.statuses = [500, 302, *[503] * 10]
    receiver.location = f"{receiver.url}/elsewhere"
    for number in range(len(RETRY_S)):
        assert send_due(api, deliverer) == 1
        (delivery,) = deliveries(api, webhook)
        assert (delivery["state"], delivery["attempt"]) == ("pending", number + 1)
        assert delivery["next_attempt_at"] is not None
        assert send_due(api, deliverer) == 0, "the next attempt waits"
        make_due(api, webhook)
    assert send_due(api, deliverer) == 1
    (delivery,) = deliveries(api, webhook)
    assert (delivery["state"], delivery["status"], delivery["error"]) == ("failed", 503, "answered 503")
    assert {r.headers["webhook-id"] for r in receiver.received} == {delivery["id"]}
    assert {r.path for r in receiver.received} == {"/hook?a=b"}, "no redirect is followed"
    assert len({r.body for r in receiver.received}) == 1
    shown = api.as_tenant().get(f"/v1/webhooks/{webhook['id']}").json()
    assert (shown["state"], "8 attempts" in shown["disabled_reason"]) == ("disabled", True)
    api.finish(submit(api, 1))
    assert len(deliveries(api, webhook)) == 1, "a disabled endpoint is told of nothing new"
    assert api.as_tenant().post(f"/v1/webhooks/{webhook['id']}/ping").status_code == 409


def test_a_disabled_endpoint_gets_what_waited_once_it_is_enabled(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished")
    path = f"/v1/webhooks/{webhook['id']}"
    api.finish(submit(api, 1))
    api.finish(submit(api, 1))
    receiver.statuses = [410]
    assert send_due(api, deliverer) == 1, "410 ends it at once"
    assert api.as_tenant().get(path).json()["disabled_reason"] == "it answered 410, that it wants no more"
    assert send_due(api, deliverer) == 0
    assert sorted((d["state"], d["next_attempt_at"]) for d in deliveries(api, webhook)) == [
        ("failed", None),
        ("pending", None),
    ]
    assert api.as_tenant().patch(path, json={"enabled": True}).json()["state"] == "enabled"
    assert send_due(api, deliverer) == 1
    assert api.as_tenant().patch(path, json={"enabled": False}).json()["disabled_reason"] == "you disabled it"


def test_a_closed_tenant_hears_nothing_unless_its_deletion_is_called_off(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished")
    waiting, running = submit(api, 1), submit(api, 1)
    api.finish(waiting)
    tenant = api.tenant_id(api.as_tenant().get("/v1/tenant").json()["name"])
    (pending,) = deliveries(api, webhook)
    delivery = UUID(pending["id"].removeprefix("msg_"))
    api.owner(lambda conn: erasure.close(conn, tenant, grace_s=1e6))
    stop(api.ledger.work, tenant)
    with api.ledger.working() as conn:
        assert webhooks.read_due(conn) == []
        assert webhooks.due_rings(conn) == []
    assert deliverer.deliver(delivery) is None, "nor by a message that was on its way"
    assert receiver.received == []

    assert api.owner(lambda conn: erasure.keep(conn, tenant))
    with api.ledger.working() as conn:
        assert delivery in webhooks.due_rings(conn)
    assert send_due(api, deliverer) == 2
    told = {json.loads(heard.body)["data"]["id"] for heard in receiver.received}
    assert told == {waiting, running}, "what was cancelled while it was closed is told as well"


def test_a_rotated_secret_signs_beside_the_one_before_until_that_ends(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished")
    path = f"/v1/webhooks/{webhook['id']}"
    rotated = api.as_tenant().post(f"{path}/rotate").json()
    assert rotated["secret"] != webhook["secret"]
    assert rotated["previous_secret_until"] is not None
    assert "secret" not in api.as_tenant().get(path).json()
    assert api.as_tenant().post(f"{path}/ping").status_code == 202
    send_due(api, deliverer)
    ping = receiver.received[-1]
    for secret in (webhook["secret"], rotated["secret"]):
        assert standardwebhooks.Webhook(secret).verify(ping.body, ping.headers)["type"] == "ping"
    last = api.as_tenant().post(f"{path}/rotate", json={"overlap_s": 0}).json()
    api.as_tenant().post(f"{path}/ping")
    send_due(api, deliverer)
    ping = receiver.received[-1]
    standardwebhooks.Webhook(last["secret"]).verify(ping.body, ping.headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(rotated["secret"]).verify(ping.body, ping.headers)


def test_a_deliverer_that_died_is_followed_once_its_lease_has_lapsed_and_none_sends_beside_another(
    api: Api, receiver: Receiver, deliverer: Deliverer
) -> None:
    webhook = register(api, receiver, "batch.finished")
    api.finish(submit(api, 1))
    api.finish(submit(api, 1))
    with api.ledger.working() as conn:
        (first,) = webhooks.read_due(conn)
        dead = webhooks.begin_attempt(conn, first)
    assert dead is not None
    with api.ledger.working() as conn:
        assert webhooks.read_due(conn) == []
        rows = conn.execute(text("SELECT id FROM webhook_deliveries WHERE webhook_id = :id"), {"id": dead.webhook})
        assert [webhooks.begin_attempt(conn, row.id) for row in rows] == [None, None]
        conn.execute(
            text("UPDATE webhook_deliveries SET leased_until = clock_timestamp() WHERE id = :id"), {"id": first}
        )
    assert send_due(api, deliverer) == 2
    with api.ledger.working() as conn:  # the dead one wakes up
        webhooks.end_attempt(conn, dead, status=500, error="late", retry_in_s=None)
    assert {d["state"] for d in deliveries(api, webhook)} == {"delivered"}
    assert sorted(d["attempt"] for d in deliveries(api, webhook)) == [1, 2]


def test_an_endpoint_that_trickles_is_left_and_holds_up_nobody_else(
    api: Api, receiver: Receiver, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.endpoints.TOTAL_S", 3.0)
    with receiving() as good:
        slow = register(api, receiver, "batch.finished")
        quick = register(api, good, "batch.finished")
        receiver.statuses = [0]
        api.finish(submit(api, 1))
        api.finish(submit(api, 1))
        deliverer.look()
        wait_until(lambda: len(good.received) == 2, "both events at the endpoint that answers")
        wait_until(lambda: deliveries(api, slow)[1]["error"] is not None, "the other's first attempt ends")
        assert deliveries(api, slow)[1]["error"] == "no answer within 3 s"
        wait_until(lambda: {d["state"] for d in deliveries(api, quick)} == {"delivered"})


def test_the_certificate_must_be_the_hosts_though_the_connection_goes_to_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "both.pem").write_text(TEST_CERTIFICATE)
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(endpoints.socket, "getaddrinfo", lambda *_, **__: here)
    with receiving(tmp_path / "both.pem") as receiver:
        port = receiver.url.rpartition(":")[2]
        right, wrong = f"https://hooks.example:{port}/", f"https://other.example:{port}/"
        assert endpoints.post(right, "{}", {}, allow_loopback=True).error == "no answer: ConnectError"
        trusting = ssl.create_default_context(cafile=tmp_path / "both.pem")
        monkeypatch.setattr(endpoints, "_tls", lambda: trusting)
        assert endpoints.post(wrong, "{}", {}, allow_loopback=True).error == "no answer: ConnectError"
        assert receiver.received == []
        assert endpoints.post(right, "{}", {}, allow_loopback=True).status == 204
        assert receiver.received[0].headers["Host"] == f"hooks.example:{port}"


def test_a_webhook_is_changed_and_deleted_by_its_tenant_alone(api: Api, receiver: Receiver) -> None:
    webhook = register(api, receiver, "batch.finished", description="mine")
    path = f"/v1/webhooks/{webhook['id']}"
    tenant, stranger = api.as_tenant(), api.as_tenant("globex")
    for method, place in (
        ("GET", path),
        ("PATCH", path),
        ("DELETE", path),
        ("POST", f"{path}/rotate"),
        ("POST", f"{path}/ping"),
        ("GET", f"{path}/deliveries"),
    ):
        content = b"{}" if method == "PATCH" else None
        assert stranger.request(method, place, content=content).status_code == 404
        assert api.anonymous.request(method, place, content=content).status_code == 401
    assert stranger.get("/v1/webhooks").json()["webhooks"] == []
    changed = tenant.patch(path, json={"events": ["batch.failing"], "failed_jobs": 3, "description": None}).json()
    assert (changed["events"], changed["failed_jobs"], changed["description"]) == (["batch.failing"], 3, None)
    assert fields_of(tenant.patch(path, json={"failed_jobs": None})) == ["failed_jobs"]
    assert fields_of(tenant.patch(path, json={"url": "ftp://x", "events": []})) == ["url", "events", "failed_jobs"]
    assert [w["id"] for w in tenant.get("/v1/webhooks").json()["webhooks"]] == [webhook["id"]]
    assert tenant.delete(path).status_code == 204
    assert tenant.get(path).status_code == 404
    actions = [entry["action"] for entry in tenant.get("/v1/audit").json()["entries"]]
    assert actions[:3] == ["webhook.delete", "webhook.change", "webhook.create"]


def test_every_fault_of_a_webhook_is_said_and_a_key_makes_one(api: Api, receiver: Receiver) -> None:
    tenant = api.as_tenant()
    body = {"url": "http://localhost/x", "events": ["adapter.quarantined"], "batch_id": "batch_1", "failed_jobs": 1}
    assert set(fields_of(tenant.post("/v1/webhooks", json=body | {"description": ""}))) == {
        "batch_id",
        "events",
        "failed_jobs",
        "description",
    }
    assert fields_of(tenant.post("/v1/webhooks", json={"url": "https://x", "events": ["nonsense"]})) == ["events[0]"]
    headers = {"Idempotency-Key": "k"}
    made = [
        tenant.post("/v1/webhooks", json={"url": receiver.url, "events": ["batch.finished"]}, headers=headers).json()
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len(tenant.get("/v1/webhooks").json()["webhooks"]) == 1


def test_an_endpoint_that_is_deleted_while_its_event_is_written_fails_no_job(api: Api, receiver: Receiver) -> None:
    webhook = register(api, receiver, "batch.finished")
    batch = submit(api, 1)
    engine = make_engine(api.ledger.work.url.render_as_string(hide_password=False), name="deleting", pool_size=1)
    with transaction(engine) as conn:
        assert webhooks.delete_webhook(conn, UUID(webhook["id"].removeprefix("wh_")))
        assert len(api.finish(batch)) == 1
    engine.dispose()
    assert api.as_tenant().get(f"/v1/batches/{batch}").json()["counts"]["succeeded"] == 1
    api.ledger.recount()
