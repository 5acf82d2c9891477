"""OpenAI batches whose input the store loses, for a while or for good, while its lines become jobs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import Api, uuid_of
from openai_service import client_of, close_clients, completion_line, finish_queued, make_tasks, read_lines, upload
from sqlalchemy import text

from medley.config import Limits
from medley.objects import StoreUnavailable

LIMITS = Limits(max_jobs_per_request=100)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


class Losing:
    """A batch of six lines whose input is lost once `num_made` are jobs."""

    def __init__(self, api: Api, monkeypatch: pytest.MonkeyPatch, num_made: int = 2) -> None:
        monkeypatch.setattr("medley.tasks.validate.JOBS_A_CHUNK", num_made)
        self.api, self.client, self.tasks = api, client_of(api), make_tasks(api)
        self.validator = self.tasks._validator
        self.objects = self.validator._objects
        file = upload(self.client, [completion_line(str(i)) for i in range(6)])
        self.key = f"files/{api.tenant_id(api._tenant).hex}/{uuid_of(file).hex}"
        with self.objects.open_read(self.key) as source:
            self.data = source.read()
        options: Any = {"endpoint": "/v1/completions", "completion_window": "24h"}
        self.id = self.client.batches.create(input_file_id=file, **options).id
        chunks: list[None] = []
        self.validator._on_chunk = lambda: chunks.append(None)
        # One chunk while judging, one of jobs.
        self.tasks._should_stop = self.validator._should_stop = lambda: len(chunks) == 2
        self.tasks.run(uuid_of(self.id))
        self.tasks = make_tasks(api)
        self.objects.delete(self.key)

    def retrieve(self) -> Any:
        return self.client.batches.retrieve(self.id)

    def look(self, *, after_s: float = 0.0) -> Any:
        """The batch after the next step, `after_s` seconds later."""
        ago = (
            "UPDATE openai_batches SET due_at = clock_timestamp(),"
            " input_lost_at = input_lost_at - make_interval(secs => :s) WHERE id = :id AND due_at IS NOT NULL"
        )
        with self.api.ledger.working() as conn:
            conn.execute(text(ago), {"id": uuid_of(self.id), "s": after_s})
        self.tasks.look()
        return self.retrieve()


def test_a_batch_whose_input_is_away_for_a_while_goes_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    losing = Losing(api, monkeypatch)
    assert losing.look().status == "in_progress"
    assert losing.look(after_s=600).status == "in_progress"
    losing.objects.put(losing.key, io.BytesIO(losing.data))
    losing.look(after_s=10_000)
    finish_queued(api)
    ended = losing.look()
    assert (ended.status, ended.request_counts.completed, ended.errors) == ("completed", 6, None)
    api.ledger.recount()


def test_a_batch_whose_input_is_lost_fails_with_what_it_has_done(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    losing = Losing(api, monkeypatch)
    finish_queued(api, text="done")
    losing.look()
    assert losing.look(after_s=800).status == "in_progress"
    losing.look(after_s=200)
    ended = losing.look()
    counts = ended.request_counts
    assert (ended.status, counts.total, counts.completed, counts.failed) == ("failed", 6, 2, 4)
    assert ended.failed_at is not None
    assert [(error.code, error.line) for error in ended.errors.data] == [("file_not_found", None)]
    assert [line["custom_id"] for line in read_lines(losing.client, ended.output_file_id)] == ["0", "1"]
    native = api.as_tenant()
    shown = native.get(f"/v1/batches/{losing.id}").json()
    assert (shown["state"], shown["counts"]["total"]) == ("finished", 2)
    used = native.get("/v1/limits").json()["quotas"]
    assert (used["queued_jobs"]["used"], used["queued_bytes"]["used"]) == (0, 0)
    api.ledger.recount()


def test_an_input_that_is_lost_once_all_its_lines_are_jobs_is_not_missed(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = Losing(api, monkeypatch, num_made=6)
    finish_queued(api)
    losing.look()
    losing.look(after_s=1000)
    ended = losing.look()
    assert (ended.status, ended.request_counts.completed, ended.errors) == ("completed", 6, None)
    api.ledger.recount()


@pytest.mark.parametrize("ended_by", ["cancel", "deadline"])
def test_a_lost_input_is_not_waited_for_once_the_batch_is_over(
    api: Api, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    losing = Losing(api, monkeypatch)

    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(type(losing.objects), "open_read", away)
    assert losing.look().status == "in_progress"
    assert losing.look(after_s=100_000).status == "in_progress", "a store that is away may come back"
    if ended_by == "cancel":
        losing.client.batches.cancel(losing.id)
    else:
        finish_queued(api)
        with api.ledger.working() as conn:
            late = "UPDATE batches SET deadline_at = clock_timestamp() WHERE id = :id"
            conn.execute(text(late), {"id": uuid_of(losing.id)})
    losing.look()
    ended = losing.look()
    assert ended.status == ("cancelled" if ended_by == "cancel" else "failed")
    assert [error.code for error in ended.errors.data] == ["file_unreadable"]
    assert ended.request_counts.completed + ended.request_counts.failed == 6
    api.ledger.recount()
