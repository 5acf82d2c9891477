"""Counts of requests that are several jobs each: exact for small batches, remembered for large ones, counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_server import Api
from openai_service import client_of, close_clients, completion_line, create, make_tasks, wait_for
from sqlalchemy import Connection

from medley.api.openai import request_counts
from medley.config import Limits
from medley.db.openai_batches import count_requests

LIMITS = Limits(max_jobs_per_request=100)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by each count that the database makes."""
    made: list[object] = []

    def count(conn: Connection, batch: object) -> tuple[int, int]:
        made.append(batch)
        return count_requests(conn, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(request_counts, "count_requests", count)
    return made


def begin(api: Api, num_requests: int = 4) -> str:
    lines = [completion_line(f"c{i}", n=3) for i in range(num_requests)]
    batch = create(client_of(api), lines).id
    make_tasks(api).look()
    return batch


def completed(api: Api, batch: str) -> int:
    return client_of(api).batches.retrieve(batch).request_counts.completed


def test_a_small_batch_is_counted_again_only_once_it_has_moved(api: Api, counted: list[object]) -> None:
    batch = begin(api)
    assert [completed(api, batch) for _ in range(3)] == [0, 0, 0]
    assert len(counted) == 1
    api.finish(batch, 4)
    assert [completed(api, batch) for _ in range(3)] == [1, 1, 1]
    assert client_of(api).batches.list(limit=1).data[0].request_counts.completed == 1
    assert len(counted) == 2
    api.finish(batch)
    make_tasks(api).look()
    assert wait_for(client_of(api), batch, "completed").request_counts.completed == 4
    assert len(counted) <= 3, "the end's counts stand in its row"


def test_a_large_batch_rests_after_a_count_whatever_moves(
    api: Api, counted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_counts, "EXACT_JOBS", 0)
    monkeypatch.setattr(request_counts, "REST", 1e6)
    batch = begin(api)
    assert completed(api, batch) == 0
    api.finish(batch, 6)
    assert (completed(api, batch), len(counted)) == (0, 1)
    api.finish(batch)
    make_tasks(api).look()
    assert wait_for(client_of(api), batch, "completed").request_counts.completed == 4


def test_those_who_ask_at_once_share_one_count(
    api: Api, counted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = begin(api)
    slow = request_counts.RequestCounts._count

    async def count(*arguments: object) -> tuple[int, int]:
        await asyncio.sleep(1)  # all eight have asked by then
        return await slow(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(request_counts.RequestCounts, "_count", count)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: completed(api, batch), range(8))) == [0] * 8
    assert len(counted) == 1
    api.finish(batch)


def test_the_cache_holds_no_more_than_it_says(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_counts, "MAX_KNOWN", 2)
    batches = [begin(api, 1) for _ in range(4)]
    assert [completed(api, batch) for batch in batches] == [0] * 4
    known = api._app.state.services.request_counts._known
    assert len(known) <= 2
    for batch in batches:
        api.finish(batch)
