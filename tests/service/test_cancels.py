"""Large batches cancelled: answered at once, ended piece by piece by the tasks, and nothing of them is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_server import Api, uuid_of
from openai_service import client_of, close_clients, completion_line, create, make_tasks, wait_for
from sqlalchemy import text

from medley.api import batches as api_batches
from medley.config import Limits
from medley.db import cancels
from medley.db.connections import transaction
from medley.db.inputs import fetch_inputs
from medley.tasks import cancel, erase
from medley.tasks.cancel import Canceller

LIMITS = Limits()
PIECE = 3


@pytest.fixture(autouse=True)
def _small_pieces(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cancels, "PIECE_JOBS", PIECE)
    # Messages go nowhere here: each test says who hears what.
    monkeypatch.setattr(api_batches, "CANCEL_TASK", "medley.nobody")
    api.take_new_tenant()
    yield
    close_clients()


def submit(api: Api, num_jobs: int) -> str:
    body = {"jobs": [{"prompt": f"p{i}", "custom_id": f"c{i}"} for i in range(num_jobs)]}
    batch: str = api.as_tenant().post("/v1/batches", json=body).raise_for_status().json()["id"]
    return batch


def canceller(api: Api, **options: Any) -> Canceller:
    return Canceller(api.ledger.work, api.ringer, api.settings.pool, **options)


def test_a_large_batch_is_cancelling_at_once_and_its_queue_ends_in_pieces(api: Api) -> None:
    tenant = api.as_tenant()
    batch = submit(api, 10)
    shown = tenant.post(f"/v1/batches/{batch}/cancel").json()
    assert (shown["state"], shown["counts"]["cancelled"]) == ("cancelling", PIECE)
    refused = tenant.post(f"/v1/batches/{batch}/retry", json={"states": ["cancelled"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    num_pieces = 0

    def count() -> None:
        nonlocal num_pieces
        num_pieces += 1

    canceller(api, on_chunk=count).run(uuid_of(batch))
    ended = tenant.get(f"/v1/batches/{batch}").json()
    assert (ended["state"], ended["counts"]["cancelled"], num_pieces) == ("finished", 10, 4)
    page = tenant.get(f"/v1/batches/{batch}/results").json()
    assert [result["seq"] for result in page["results"]] == list(range(1, 11))
    api.ledger.check()


def test_a_cancel_that_nobody_was_told_of_is_found_and_gone_through_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "LOOK_S", 3600.0)
    batches = [submit(api, 7), submit(api, 2), submit(api, 8)]
    for batch in batches[:2]:
        assert api.as_tenant().post(f"/v1/batches/{batch}/cancel").status_code == 200
    api.finish(batches[0], 1)  # claimed before its piece came: it ends as its worker says
    tasks = canceller(api)
    tasks.look()
    states = [api.as_tenant().get(f"/v1/batches/{batch}").json()["state"] for batch in batches]
    assert states == ["finished", "finished", "running"]
    assert api.as_tenant().post(f"/v1/batches/{batches[2]}/cancel").status_code == 200
    tasks.look()  # not due yet: each look goes through all open batches
    assert api.as_tenant().get(f"/v1/batches/{batches[2]}").json()["state"] == "cancelling"
    canceller(api).look()
    assert api.as_tenant().get(f"/v1/batches/{batches[2]}").json()["state"] == "finished"
    api.ledger.check()


def test_a_batch_that_is_cancelled_once_more_is_gone_through_once_more(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "LOOK_S", 0.0)
    batch, tasks = submit(api, 8), canceller(api)
    tenant = api.as_tenant()
    for _ in range(2):
        assert tenant.post(f"/v1/batches/{batch}/cancel").json()["state"] == "cancelling"
        tasks.look()
        assert tenant.get(f"/v1/batches/{batch}").json()["state"] == "finished"
        assert tenant.post(f"/v1/batches/{batch}/retry", json={"states": ["cancelled"]}).status_code == 200
    api.finish(batch)
    api.ledger.check()


def test_a_task_that_stops_between_two_pieces_leaves_the_rest_to_the_next(api: Api) -> None:
    batch = submit(api, 10)
    api.as_tenant().post(f"/v1/batches/{batch}/cancel")
    calls = iter([False, True])
    canceller(api, should_stop=lambda: next(calls)).run(uuid_of(batch))
    assert api.as_tenant().get(f"/v1/batches/{batch}").json()["counts"]["cancelled"] == PIECE
    canceller(api).run(uuid_of(batch))
    assert api.as_tenant().get(f"/v1/batches/{batch}").json()["state"] == "finished"


def test_a_piece_of_a_batch_that_runs_ends_nothing(api: Api) -> None:
    batch = submit(api, 4)
    canceller(api).run(uuid_of(batch))
    counts = api.as_tenant().get(f"/v1/batches/{batch}").json()["counts"]
    assert (counts["queued_or_running"], counts["cancelled"]) == (4, 0)
    api.finish(batch)


def test_a_worker_that_claims_a_job_before_its_piece_is_told_not_to_run_it(api: Api) -> None:
    batch = submit(api, 8)
    api.as_tenant().post(f"/v1/batches/{batch}/cancel")
    worker = api.ledger.start_worker()
    with api.ledger.working() as conn:
        statement = text("SELECT lane FROM jobs WHERE batch_id = :id LIMIT 1")
        lane = conn.execute(statement, {"id": uuid_of(batch)}).scalar_one()
    claimed = api.ledger.claim(worker, [(lane, 2)])
    with api.ledger.working() as conn:
        assigned = fetch_inputs(conn, worker, [job.job for job in claimed])
    assert [job.is_cancelled for job in assigned] == [True, True]
    canceller(api).run(uuid_of(batch))
    assert api.as_tenant().get(f"/v1/batches/{batch}").json()["state"] == "cancelling", "two are at a worker"
    api.ledger.complete(worker, [(job.job, job.attempt) for job in claimed])
    assert api.as_tenant().get(f"/v1/batches/{batch}").json()["state"] == "finished"
    api.ledger.check()


def test_an_openai_batch_is_cancelling_until_its_last_piece_has_ended(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line(f"c{i}") for i in range(9)])
    tasks = make_tasks(api)
    tasks.look()
    cancelled = client.batches.cancel(batch.id)
    assert (cancelled.status, cancelled.request_counts.failed) == ("cancelling", PIECE)
    assert cancelled.cancelling_at is not None
    tasks.look()
    assert client.batches.retrieve(batch.id).status == "cancelling"
    canceller(api).run(uuid_of(batch.id))
    tasks.look()
    ended = wait_for(client, batch.id, "cancelled")
    assert (ended.request_counts.total, ended.request_counts.failed) == (9, 9)
    api.ledger.check()


def test_a_closed_tenant_has_nothing_queued_before_it_is_erased(api: Api) -> None:
    batch = submit(api, 10)
    tenant = api.tenant_id(api.as_tenant().get("/v1/tenant").json()["name"])
    assert erase.stop(api.ledger.work, tenant) == 0
    with transaction(api.ledger.work) as conn:
        statement = text("SELECT DISTINCT state FROM jobs WHERE batch_id = :id")
        assert list(conn.execute(statement, {"id": uuid_of(batch)}).scalars()) == ["cancelled"]
    api.ledger.check()
