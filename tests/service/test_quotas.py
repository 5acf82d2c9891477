"""Quotas and rates of tenants: exact under concurrency, given back by every end of a job, refused with nothing done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from api_server import Api, adapter_files, running_api, stop_windows
from sqlalchemy import text
from timing import keeps_to, timed
from waiting import wait_until

from medley.api import rates
from medley.config import Limits, Quotas, Settings
from medley.db import flags, sweeps
from medley.db.quotas import set_limits
from medley.local.embedded import EmbeddedServers
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import parse_id
from medley.spec.jobs import JobState
from medley.tasks.expand import Expander

LIMITS = Limits()
SHORTLY_S = rates.REDIS_TIMEOUT_S


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """No process counts requests for itself because Redis was held up for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "REDIS_TIMEOUT_S", 30.0)
        yield


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> None:
    api.take_new_tenant()


@pytest.fixture
def limited(api: Api) -> Iterator[Any]:
    """`limited(queued_jobs=3)` is a client of a new tenant that has these limits of its own."""
    clients: list[httpx.Client] = []

    def make(**limits: float | None) -> httpx.Client:
        name = api.take_new_tenant()
        api.key(name)
        tenant = api.tenant_id(name)
        api.owner(lambda conn: set_limits(conn, tenant, limits))
        headers = {"Authorization": f"Bearer {api.key(name)}"}
        clients.append(httpx.Client(base_url=api.url, headers=headers, timeout=60))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def used(client: httpx.Client) -> dict[str, int]:
    quotas = client.get("/v1/limits").json()["quotas"]
    return {name: quota["used"] for name, quota in quotas.items()}


def check_refused(response: httpx.Response, quota: str, *numbers: int) -> None:
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert error["code"] == "quota_exceeded"
    assert quota in error["message"]
    for number in numbers:
        assert str(number) in error["message"]
    assert int(response.headers["retry-after"]) > 0


def test_a_tenant_sees_its_limits_and_what_it_uses(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=7)
    client.post("/v1/jobs", json={"prompt": "héllo"})
    client.post("/v1/jobs", json={"prompt_token_ids": [1, 2]})
    assert client.put("/v1/adapters/a", files=adapter_files()).status_code == 201
    shown = client.get("/v1/limits").json()
    assert shown["quotas"]["queued_jobs"] == {"limit": 7, "used": 2}
    assert shown["quotas"]["queued_bytes"] == {"limit": Quotas().queued_bytes, "used": 6 + 8}
    assert shown["quotas"]["adapters"] == {"limit": Quotas().adapters, "used": 1}
    assert shown["quotas"]["storage_bytes"]["used"] > 1000
    assert shown["quotas"]["requests_per_s"] == {"limit": Quotas().requests_per_s, "used": None}
    assert shown["request"]["max_prompt_bytes"] == LIMITS.max_prompt_bytes
    api.ledger.check()


def test_a_full_queue_refuses_what_is_more_and_takes_it_when_jobs_have_ended(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=3)
    batch = client.post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 2}).json()
    num_jobs = len(api.ledger.jobs())
    check_refused(client.post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 2}), "queued_jobs", 3, 2)
    lines = {"Content-Type": "application/x-ndjson"}
    check_refused(client.post("/v1/batches", content=b'{"prompt": "a"}\n' * 2, headers=lines), "queued_jobs", 3, 2)
    check_refused(
        client.post("/v1/sweeps", json={"name": "s", "prompts": ["a", "b"], "include_base": True}), "queued_jobs"
    )
    alone = client.post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 4})
    check_refused(alone, "queued_jobs", 4)
    assert "send less at once" in alone.json()["error"]["message"]
    assert len(api.ledger.jobs()) == num_jobs
    assert client.get("/v1/sweeps").json()["sweeps"] == []
    api.finish(batch["id"], 1)
    assert client.post("/v1/batches", json={"jobs": [{"prompt": "a"}] * 2}).status_code == 201
    api.ledger.check()


def test_a_refused_create_leaves_its_idempotency_key_free(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=1)
    first = client.post("/v1/jobs", json={"prompt": "a"}).json()
    again = {"Idempotency-Key": "k"}
    check_refused(client.post("/v1/jobs", json={"prompt": "a"}, headers=again), "queued_jobs")
    api.finish(first["batch_id"])
    made = client.post("/v1/jobs", json={"prompt": "a"}, headers=again)
    assert made.status_code == 201
    # A replay adds nothing, so a full queue does not refuse it.
    assert client.post("/v1/jobs", json={"prompt": "a"}, headers=again).json()["id"] == made.json()["id"]


def test_of_many_creates_at_once_exactly_as_many_pass_as_there_is_room(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=20)

    def create(number: int) -> tuple[int, int]:
        size = number % 3 + 1
        return size, client.post("/v1/batches", json={"jobs": [{"prompt": "a"}] * size}).status_code

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(create, range(36)))
    assert {status for _, status in answers} == {201, 429}
    taken = sum(size for size, status in answers if status == 201)
    assert taken == used(client)["queued_jobs"]
    assert 18 <= taken <= 20, "no room is left for a batch that was refused later"
    api.ledger.check()


def test_every_end_of_a_job_gives_its_room_back(api: Api, limited: Any) -> None:
    client = limited()
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = [
        client.post("/v1/batches", json={"jobs": [{"prompt": "ab"}] * 3, "deadline_at": deadline}).json()["id"]
        for deadline in (None, None, None, soon)
    ]
    assert used(client)["queued_jobs"] == 12
    assert used(client)["queued_bytes"] == 24
    job = client.post("/v1/jobs", json={"prompt": "abc"}).json()
    client.post(f"/v1/jobs/{job['id']}/cancel")
    api.finish(made[0])
    api.finish(made[1], 1)
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (8, 18)
    client.post(f"/v1/batches/{made[1]}/cancel")
    client.post(f"/v1/batches/{made[2]}/pause")
    client.post(f"/v1/batches/{made[2]}/cancel")
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (3, 6)
    batch = parse_id("batch", made[3])
    assert batch is not None
    api.ledger.let_deadline_pass(batch)
    with api.ledger.working() as conn:
        flags.expire_queued(conn)
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (0, 0)
    api.ledger.check()


def test_a_cancelled_sweep_gives_back_the_cells_that_never_were_jobs(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=10)
    sweep = client.post("/v1/sweeps", json={"name": "s", "prompts": ["ab"] * 5, "include_base": True, "seeds": [1, 2]})
    assert sweep.status_code == 201
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (10, 10), "each prompt is stored once"
    client.post(f"/v1/batches/{sweep.json()['id']}/cancel")
    assert used(client)["queued_jobs"] == 10
    with api.ledger.working() as conn:
        waiting = sweeps.read_unexpanded(conn)
    for unexpanded in waiting:
        Expander(api.ledger.work, api.ringer, api.ledger.pool).expand(unexpanded)
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (0, 0)
    api.ledger.check()


def test_the_bytes_of_waiting_prompts_are_limited(limited: Any) -> None:
    client = limited(queued_bytes=10)
    assert client.post("/v1/jobs", json={"prompt": "é" * 4}).status_code == 201
    check_refused(client.post("/v1/jobs", json={"prompt": "abc"}), "queued_bytes", 10, 8, 3)
    check_refused(client.post("/v1/jobs", json={"prompt_token_ids": [1]}), "queued_bytes", 10, 8, 4)
    assert client.post("/v1/jobs", json={"prompt": "ab"}).status_code == 201


def test_adapters_and_their_bytes_are_limited(limited: Any) -> None:
    client = limited(adapters=1)
    assert client.put("/v1/adapters/a", files=adapter_files()).status_code == 201
    check_refused(client.put("/v1/adapters/b", files=adapter_files()), "adapters", 1)
    assert client.put("/v1/adapters/a", files=adapter_files()).status_code == 200
    size = used(client)["storage_bytes"]
    assert client.delete("/v1/adapters/a").status_code == 204
    assert client.put("/v1/adapters/b", files=adapter_files()).status_code == 201
    assert used(client) | {"requests_per_s": None} == {
        "queued_jobs": 0,
        "queued_bytes": 0,
        "adapters": 1,
        "storage_bytes": 2 * size,
        "requests_per_s": None,
    }
    small = limited(storage_bytes=size + 1)
    assert small.put("/v1/adapters/a", files=adapter_files()).status_code == 201
    check_refused(small.put("/v1/adapters/b", files=adapter_files("caesar-3")), "storage_bytes", size)
    assert [a["name"] for a in small.get("/v1/adapters").json()["adapters"]] == ["a"]


def test_of_many_uploads_at_once_no_more_pass_than_there_is_room(limited: Any) -> None:
    client = limited(adapters=2)
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda i: client.put(f"/v1/adapters/a{i}", files=adapter_files()).status_code, range(6))
        )
    assert sorted(answers) == [201, 201, 429, 429, 429, 429]


def test_too_many_requests_a_second_are_refused_until_later_and_of_this_tenant_alone(api: Api, limited: Any) -> None:
    client = limited(requests_per_s=0.5)
    answers = [client.get("/v1/tenant") for _ in range(8)]
    assert [a.status_code for a in answers] == [200] * 5 + [429] * 3
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limited"
    assert "0.5 requests a second" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert api.as_tenant("globex").get("/v1/tenant").status_code == 200
    # The anonymous are told no more than that they are.
    assert api.anonymous.get("/v1/tenant").status_code == 401


def test_while_redis_hangs_requests_are_served_and_counted_all_the_same(
    database: Any, embedded: EmbeddedServers, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "REDIS_TIMEOUT_S", SHORTLY_S)
    stop_windows(monkeypatch)
    with running_api(database, embedded.redis_url, store_url) as api:

        def attempt() -> float:
            name = api.take_new_tenant()
            headers = {"Authorization": f"Bearer {api.key(name)}"}
            tenant = api.tenant_id(name)
            api.owner(lambda conn: set_limits(conn, tenant, {"requests_per_s": 0.5}))
            os.kill(embedded.pid("redis"), signal.SIGSTOP)
            try:
                answers = [api.anonymous.get("/v1/tenant", headers=headers) for _ in range(8)]
            finally:
                os.kill(embedded.pid("redis"), signal.SIGCONT)
            assert [a.status_code for a in answers] == [200] * 5 + [429] * 3
            return sum(a.elapsed.total_seconds() for a in answers)

        keeps_to(5, attempt, "one of them waited for Redis, and shortly")


def test_limits_that_the_operator_changes_hold_within_seconds(api: Api, limited: Any) -> None:
    def attempt() -> float:
        client = limited(queued_jobs=0)
        check_refused(client.post("/v1/jobs", json={"prompt": "a"}), "queued_jobs", 0)
        tenant = api.tenant_id(client.get("/v1/tenant").json()["name"])
        api.owner(lambda conn: set_limits(conn, tenant, {"queued_jobs": None}))
        with timed() as took:
            wait_until(lambda: client.post("/v1/jobs", json={"prompt": "a"}).status_code == 201, "the new limit")
        return took.seconds

    keeps_to(8, attempt)


def test_limits_come_from_the_configuration_and_usage_from_before_there_were_any(empty_database: Any) -> None:
    from sqlalchemy import create_engine

    from medley.db.migrate import upgrade
    from medley.spec.ids import uuid7

    env = {
        "MEDLEY_DATABASE_URL": "postgresql://x@/medley?host=/tmp",
        "MEDLEY_REDIS_URL": "unix:///tmp/redis.sock",
        "MEDLEY_STORE_URL": "file:///tmp",
        "MEDLEY_QUOTA_QUEUED_JOBS": "5",
        "MEDLEY_QUOTA_REQUESTS_PER_S": "2.5",
    }
    quotas = Settings.from_env(env).quotas
    assert (quotas.queued_jobs, quotas.requests_per_s, quotas.adapters) == (5, 2.5, Quotas().adapters)

    upgrade(empty_database.url("medley_owner"), "0001")
    tenant = uuid7()
    owner = create_engine(empty_database.url("medley_owner"))
    with owner.begin() as conn:
        conn.execute(text("INSERT INTO tenants (id, name) VALUES (:id, 'acme')"), {"id": tenant})
    owner.dispose()
    work = create_engine(empty_database.url("medley_work"))
    statement = text(
        "INSERT INTO batches (id, tenant_id, pool, total, succeeded, finished_at) VALUES (:id, :tenant, 'p', 5, :done,"
        " CASE WHEN :done = 5 THEN clock_timestamp() END)"
    )
    with work.begin() as conn:
        for done in (5, 3, 0):
            conn.execute(statement, {"id": uuid7(), "tenant": tenant, "done": done})
    upgrade(empty_database.url("medley_owner"))
    with work.begin() as conn:
        assert conn.execute(text("SELECT tenant_id, queued_jobs FROM tenant_usage")).all() == [(tenant, 7)]
    work.dispose()


def test_retries_and_extensions_take_room_in_the_queue_or_are_refused_whole(api: Api, limited: Any) -> None:
    client = limited(queued_jobs=4)
    batch = client.post("/v1/batches", json={"jobs": [{"prompt": "ab"}] * 3}).json()["id"]
    api.finish(batch, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="it broke"))
    assert used(client)["queued_jobs"] == 0
    other = client.post("/v1/batches", json={"jobs": [{"prompt": "c"}] * 2}).json()["id"]
    before = client.get(f"/v1/batches/{batch}").json()
    check_refused(client.post(f"/v1/batches/{batch}/retry"), "queued_jobs", 4, 2, 3)
    assert client.get(f"/v1/batches/{batch}").json() == before
    client.patch(f"/v1/batches/{batch}", json={"priority": "high"})
    assert client.get("/v1/audit").json()["entries"][0]["action"] == "batch.change"
    client.post(f"/v1/batches/{other}/cancel")
    assert client.post(f"/v1/batches/{batch}/retry").status_code == 200
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (3, 6)
    entry = client.get("/v1/audit").json()["entries"][0]
    assert (entry["action"], entry["object"], entry["details"]) == ("batch.retry", batch, {"num_jobs": 3})

    sweep = client.post("/v1/sweeps", json={"name": "s", "prompts": ["x"], "include_base": True, "seeds": [1]}).json()
    refused = client.post("/v1/sweeps/s/extend", json={"prompts": ["why"], "seeds": [2]})
    check_refused(refused, "queued_jobs", 4, 3)
    shown = client.get("/v1/sweeps/s").json()
    assert (shown["counts"]["total"], shown["num_prompts"]) == (1, 1)
    api.finish(batch)
    assert client.post("/v1/sweeps/s/extend", json={"prompts": ["why"], "seeds": [2]}).status_code == 200
    assert (used(client)["queued_jobs"], used(client)["queued_bytes"]) == (4, 1 + 3)
    entry = client.get("/v1/audit").json()["entries"][0]
    assert (entry["action"], entry["object"]) == ("sweep.extend", sweep["id"])
    Expander(api.ledger.work, api.ringer, api.ledger.pool).expand(parse_id("sweep", sweep["id"]))
    api.finish(sweep["id"])
    assert used(client)["queued_bytes"] == 0
    api.ledger.recount()
